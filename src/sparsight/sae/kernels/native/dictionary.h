/* The encoder in low precision, laid out for the selection of latents.
 *
 * Latents stand in panels of 16. A panel holds, for each group of 4 (int8) or 2 (bfloat16)
 * dimensions, these dimensions of its 16 latents: what one vector instruction consumes.
 *
 * A selected latent must not be lost by rounding, so that each score comes with a bound, slack1[i] * c1
 * + slack2[i] * c2, where c1 and c2 belong to the vector: some standard deviations of an error that is
 * independent of what is rounded. Where much of a vector or row is rounded to 0 (one entry is huge), the
 * error is what was lost, and the bound that of Cauchy and Schwarz.
 */
#ifndef SPARSIGHT_DICTIONARY_H
#define SPARSIGHT_DICTIONARY_H

#include <stdint.h>

#if defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define WITH_AMX 1
#endif

/* What is scored at a time; a dictionary is padded to whole tiles. */
#if defined(WITH_AMX)
enum { PANEL = 16, TILE_PANELS = 2, TILE_ROWS = 32, TILE_GROUPS = 16 };
#else
enum { PANEL = 16, TILE_PANELS = 4, TILE_ROWS = 6, TILE_GROUPS = 1 };
#endif
enum { TILE_LATENTS = PANEL * TILE_PANELS };
enum { INT8 = 0, BFLOAT16 = 1 };

typedef struct {
    int64_t kind;       /* INT8 or BFLOAT16 */
    int64_t n_latents;
    int64_t d_in;
    void *codes;        /* panels, padded with latents that are never selected */
    float *scale;       /* of a latent's codes */
    int32_t *offset;    /* what the offset of the vectors' codes adds to a product */
    float *bias;        /* -inf in the padding */
    float *slack1;
    float *slack2;
} Dictionary;

#endif
