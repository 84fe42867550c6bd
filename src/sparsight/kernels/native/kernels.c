/* One training step of a sparse autoencoder, and its encoder, on a CPU.
 *
 * Compiled once for each set of instructions (see build.py); each library says whether it runs here.
 * The pre-activations never leave the registers, or the first-level cache: a tile of a few vectors and
 * latents is scored in low precision, and what can still be among the k strongest is kept. Those are
 * scored again exactly.
 */
#define _GNU_SOURCE /* syscall, with -std=c11 */

#include "blocks.h"
#include "dictionary.h"
#include "pool.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#define WITH_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__)
#define WITH_AVX2 1
#include <immintrin.h>
#endif

/* Codes of vectors: products of AVX want them from 0 on, with an offset. */
#if defined(WITH_AMX)
#define LARGEST_X 127
#define OFFSET_X 0
#elif defined(WITH_AVX2)
/* maddubs adds two products in 16 bits: 2 * 126 * 127 is the most that fits. */
#define LARGEST_X 63
#define OFFSET_X 63
#else
#define LARGEST_X 127
#define OFFSET_X 128
#endif
#define LARGEST_W 127

/* Standard deviations by which independent errors may move a score: where a threshold is guessed. */
#define DEVIATIONS 3.0f

/* Sizes of numbers between which nothing in a bound overflows, or vanishes. Rows of smaller ones are
 * coded as 0, vectors of others are scored in full. */
#define SMALLEST 1e-10f
#define LARGEST 1e10f

/* Vectors of a task: it reads the whole dictionary. */
#define LEAST_ROWS MAX(24, TILE_ROWS)

/* What a register holds, and vectors of sums that are held in registers. Wider vectors than the
 * processor's are taken apart by compilers number by number. */
#if defined(WITH_AVX512)
#define VECTOR_BYTES 64
#define SLAB_VECTORS 16
#elif defined(WITH_AVX2)
#define VECTOR_BYTES 32
#define SLAB_VECTORS 8
#else
#define VECTOR_BYTES 16
#define SLAB_VECTORS 8
#endif

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef float Floats __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES), aligned(4)));

API const char *sparsight_sources(void) { return SOURCES; }

/* By which callers make room. */
API const int64_t sparsight_tile_latents = TILE_LATENTS, sparsight_tile_groups = TILE_GROUPS,
                  sparsight_block = BLOCK;

static int64_t groups(const Dictionary *w) { /* of dimensions: 4 bytes each */
    const int64_t wanted = w->kind == INT8 ? (w->d_in + 3) / 4 : (w->d_in + 1) / 2;
    return (wanted + TILE_GROUPS - 1) / TILE_GROUPS * TILE_GROUPS;
}

static int64_t n_padded(const Dictionary *w) {
    return (w->n_latents + TILE_LATENTS - 1) / TILE_LATENTS * TILE_LATENTS;
}

static uint16_t to_bfloat16(float x) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* Write the codes of 16 latents, latent after latent, into their panel, group after group. */
static void write_panel(const Dictionary *w, int64_t panel, const int32_t *codes) {
    const int64_t n_groups = groups(w);
    int32_t *out = (int32_t *)w->codes + panel * n_groups * PANEL;
    int64_t j = 0;
    for (; j + 4 <= n_groups; j += 4)
        for (int l = 0; l < PANEL; l++)
            for (int t = 0; t < 4; t++) out[(j + t) * PANEL + l] = codes[l * n_groups + j + t];
    for (; j < n_groups; j++)
        for (int l = 0; l < PANEL; l++) out[j * PANEL + l] = codes[l * n_groups + j];
}

/* Candidates of one vector, in the order of the latents; in the end the first ones, then the rest. */
typedef struct {
    float *upper;   /* largest value that the score can have */
    float *width;   /* upper - width is what was found, in low precision */
    int32_t *latent;
    int64_t n, n_first;
    int64_t place;   /* of its scores */
    float least;     /* what a score must reach */
    float threshold; /* nothing whose upper bound lies below is kept: `least`, or a guess */
    int full;
} Candidates;

/* What a vector brings into its bounds, and its scale. */
typedef struct {
    float inverse; /* 1 / scale: scores are compared in units of the vector's scale; 0 if none fits */
    float c1, c2;
} Bounds;

#include "codes.inc"

#if defined(WITH_AMX)
#include "score_amx.inc"
#include "offer_avx512.inc"
#elif defined(WITH_AVX512)
#include "score_avx512.inc"
#include "offer_avx512.inc"
#else
#include "score_plain.inc"
#endif

#if !defined(WITH_AMX)
typedef struct {
    char none;
} Shapes;
static void begin_scores(Shapes *before) { (void)before; }
static void end_scores(const Shapes *before) { (void)before; }
#endif

API int sparsight_runs_here(void) {
#if defined(WITH_AVX512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni")
#if defined(__AVX512BF16__)
           && __builtin_cpu_supports("avx512bf16")
#endif
#if defined(WITH_AMX)
           && __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-bf16") &&
           may_use_tiles()
#endif
        ;
#elif defined(WITH_AVX2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;
#endif
}

/* How many of n values are at least t. */
static int32_t count_from(const float *values, int32_t n, float t) {
    int32_t count = 0;
    for (int32_t i = 0; i < n; i++) count += values[i] >= t;
    return count;
}

/* The smallest and the largest of n values; in vectors, which compilers do not make of it. */
static void range(const float *values, int64_t n, float *low, float *high) {
    enum { WIDTH = sizeof(Floats) / sizeof(float) };
    Floats least, most;
    for (int l = 0; l < WIDTH; l++) least[l] = INFINITY, most[l] = -INFINITY;
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        const Floats v = *(const Floats *)(values + i);
        const Ints less = v < least, more = v > most;
        least = (Floats)((less & (Ints)v) | (~less & (Ints)least));
        most = (Floats)((more & (Ints)v) | (~more & (Ints)most));
    }
    *low = INFINITY, *high = -INFINITY;
    for (; i < n; i++) *low = MIN(*low, values[i]), *high = MAX(*high, values[i]);
    for (int l = 0; l < WIDTH; l++) *low = MIN(*low, least[l]), *high = MAX(*high, most[l]);
}

/* A value that at least k of n reach, near the k-th largest; n >= k. */
static float reached_by(const float *values, int64_t n, int64_t k, int64_t slack) {
    float low, high;
    range(values, n, &low, &high);
    for (int step = 0; step < 24; step++) {
        const float middle = low + (high - low) * 0.5f;
        if (!(middle > low)) break;
        const int32_t count = count_from(values, (int32_t)n, middle);
        if (count >= k) {
            low = middle;
            if (count <= k + slack) break;
        } else {
            high = middle;
        }
    }
    return low;
}

/* Raise the threshold to what k candidates reach unless rounding moves them by more than a `share` of
 * their bounds, and drop those that surely do not. Whether k reach it is seen when they are scored. */
static void drop_hopeless(Candidates *of, int64_t k, float share, float *lower) {
    if (of->n < k) return;
    for (int64_t i = 0; i < of->n; i++) lower[i] = of->upper[i] - of->width[i] * (1 + share);
    of->threshold = MAX(of->threshold, reached_by(lower, of->n, k, k / 16));
    int64_t n = 0, i = 0;
#if defined(WITH_AVX512)
    for (; i + PANEL <= of->n; i += PANEL) {
        const __m512 upper = _mm512_loadu_ps(of->upper + i), width = _mm512_loadu_ps(of->width + i);
        const __m512i latent = _mm512_loadu_si512(of->latent + i);
        const __mmask16 kept =
            _mm512_cmp_ps_mask(upper, _mm512_set1_ps(of->threshold), _CMP_GE_OQ);
        _mm512_storeu_ps(of->upper + n, _mm512_maskz_compress_ps(kept, upper));
        _mm512_storeu_ps(of->width + n, _mm512_maskz_compress_ps(kept, width));
        _mm512_storeu_si512(of->latent + n, _mm512_maskz_compress_epi32(kept, latent));
        n += __builtin_popcount(kept);
    }
#endif
    for (; i < of->n; i++) { /* without a branch: it could not be foreseen */
        const float upper = of->upper[i];
        of->upper[n] = upper;
        of->width[n] = of->width[i];
        of->latent[n] = of->latent[i];
        n += upper >= of->threshold;
    }
    of->n = n;
}

/* Put candidates that are likely among the k largest before the rest; both stay in their order. */
static void put_first(Candidates *of, float share, float *upper, int32_t *latent) {
    int64_t n = 0, rest = 0;
    for (int64_t i = 0; i < of->n; i++) {
        const int likely = of->upper[i] - of->width[i] * (1 + share) >= of->threshold;
        upper[rest] = of->upper[i];
        latent[rest] = of->latent[i];
        of->upper[n] = of->upper[i];
        of->latent[n] = of->latent[i];
        n += likely;
        rest += !likely;
    }
    memcpy(of->upper + n, upper, (size_t)rest * 4);
    memcpy(of->latent + n, latent, (size_t)rest * 4);
    of->n_first = n;
}

/* Drop the rest of the candidates but for those that can reach a limit. */
static void drop_below(Candidates *of, float limit) {
    int64_t n = of->n_first;
    for (int64_t i = n; i < of->n; i++) {
        of->latent[n] = of->latent[i];
        n += of->upper[i] >= limit;
    }
    of->n = n;
}

#define REAL float
#define INTEGER int32_t
#define ROOT sqrtf
#define NAME(name) sparsight_##name##_f32
#include "real.inc"
#undef REAL
#undef INTEGER
#undef ROOT
#undef NAME

#define REAL double
#define INTEGER int64_t
#define ROOT sqrt
#define NAME(name) sparsight_##name##_f64
#include "real.inc"
