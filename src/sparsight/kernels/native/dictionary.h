/* The encoder in low precision, laid out for the selection of latents.
 *
 * Latents stand in panels of 16. A panel holds, for each group of 4 (int8) or 2 (bfloat16)
 * dimensions, these dimensions of its 16 latents: what one vector instruction consumes.
 *
 * A selected latent must not be lost by rounding. With x = x_q + x_r and w = w_q + w_r, codes and what
 * is lost, x . w differs from x_q . w_q by x_r . w + x_q . w_r, which cannot exceed |x_r| |w| + |x_q| |w_r|
 * (Cauchy and Schwarz), whatever the numbers are. So each score comes with a bound, slack1[i] * c1 +
 * slack2[i] * c2, where c1 and c2 belong to the vector; both allow for sums in float, too.
 *
 * What is coded is (x - centre) * stretch and w / stretch: a few huge dimensions, and what all vectors
 * have in common, would leave the rest few steps. The factors are powers of 2.
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
    float *bias;        /* with the product of row and centre, rounded up; -inf in the padding */
    float *slack1;
    float *slack2;
    float *norms;       /* of the encoder rows */
    const float *stretch, *shrink; /* [d_in], what vectors and rows are multiplied with; or NULL */
    const float *centre; /* [d_in], times stretch, and zeros up to a multiple of 16; or NULL */
    double centre_norm;  /* of that */
} Dictionary;

#endif
