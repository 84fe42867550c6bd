/* One training step of a sparse autoencoder, and its encoder, on a CPU.
 *
 * Compiled once for each set of instructions (see build.py); each library says whether it runs here.
 * The pre-activations never leave the registers: a tile of 6 vectors and 64 latents is scored in low
 * precision, and what can still be among the k strongest is kept. Those are scored again exactly.
 */
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

#if defined(WITH_AVX2)
/* maddubs adds two products in 16 bits: 2 * 126 * 127 is the most that fits. */
#define LARGEST_X 63
#else
#define LARGEST_X 127
#endif
#define LARGEST_W 127

/* Standard deviations of the rounding error that a bound allows for, on either side: of an error in
 * +-0.5 the deviation is 1 / sqrt(12). */
#define DEVIATIONS 3.0f
#define ALLOWED (DEVIATIONS * 0.28867513f)

/* Share of the energy of all but the largest entries that may be rounded to 0 without a wider bound. */
#define MOST_LOST 0.1f
#define LARGE_CODE 16

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
API const int64_t sparsight_tile_latents = TILE_LATENTS, sparsight_block = BLOCK;

API int sparsight_runs_here(void) {
#if defined(WITH_AVX512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni")
#if defined(__AVX512BF16__)
           && __builtin_cpu_supports("avx512bf16")
#endif
        ;
#elif defined(WITH_AVX2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;
#endif
}

static int64_t groups(const Dictionary *w) { /* of dimensions: 4 bytes each */
    return w->kind == INT8 ? (w->d_in + 3) / 4 : (w->d_in + 1) / 2;
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

#if !defined(WITH_AVX512)
static float from_bfloat16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
#endif

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

/* How far a score can be off by what was rounded to 0, in units of the step; 0 where that is little. */
static float lost(float in_zeros, float in_small) {
    return in_zeros > MOST_LOST * in_small ? sqrtf(in_zeros) : 0;
}

/* Candidates of one vector, in the order of the latents. */
typedef struct {
    float *upper;   /* largest value that the score can have */
    float *width;   /* upper - width is the least */
    int32_t *latent;
    int64_t n;
    float threshold; /* nothing whose upper bound lies below is wanted */
    int full;
} Candidates;

/* What a vector brings into its bounds, and its scale. */
typedef struct {
    float inverse; /* 1 / scale: scores are compared in units of the vector's scale */
    float c1, c2;
} Bounds;

#if defined(WITH_AVX512)
/* The sums are named one by one: an array of them would be kept in memory. */
#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define BEGIN_ROW(r) __m512i s##r##0 = start0, s##r##1 = start1, s##r##2 = start2, s##r##3 = start3;
#define ADD(sum)                                                                                  \
    ADD_PRODUCT(sum##0, of_vector, w0);                                                                \
    ADD_PRODUCT(sum##1, of_vector, w1);                                                                \
    ADD_PRODUCT(sum##2, of_vector, w2);                                                                \
    ADD_PRODUCT(sum##3, of_vector, w3);
#define ADD_ROW(r)                                                                                \
    {                                                                                             \
        const __m512i of_vector = _mm512_set1_epi32(*(const int32_t *)(x + r * stride + 4 * j));  \
        ADD(s##r)                                                                                 \
    }
#define END_ROW(r) acc[r][0] = s##r##0; acc[r][1] = s##r##1; acc[r][2] = s##r##2; acc[r][3] = s##r##3;
#define MULTIPLY(name)                                                                            \
    static __attribute__((noinline)) void name(                                                   \
        const uint8_t *x, int64_t stride, const uint8_t *codes,                                   \
                            int64_t n_groups, const int32_t *offset,                              \
                            __m512i acc[TILE_ROWS][TILE_PANELS]) {                                \
        const int64_t panel = n_groups * 64;                                                      \
        const __m512i zero = _mm512_setzero_si512();                                              \
        const __m512i start0 = _mm512_sub_epi32(zero, _mm512_loadu_si512(offset));                \
        const __m512i start1 = _mm512_sub_epi32(zero, _mm512_loadu_si512(offset + PANEL));        \
        const __m512i start2 = _mm512_sub_epi32(zero, _mm512_loadu_si512(offset + 2 * PANEL));    \
        const __m512i start3 = _mm512_sub_epi32(zero, _mm512_loadu_si512(offset + 3 * PANEL));    \
        EACH_ROW(BEGIN_ROW)                                                                       \
        for (int64_t j = 0; j < n_groups; j++) {                                                  \
            const uint8_t *at = codes + j * 64;                                                   \
            const __m512i w0 = _mm512_loadu_si512(at), w1 = _mm512_loadu_si512(at + panel);       \
            const __m512i w2 = _mm512_loadu_si512(at + 2 * panel);                                \
            const __m512i w3 = _mm512_loadu_si512(at + 3 * panel);                                \
            EACH_ROW(ADD_ROW)                                                                     \
        }                                                                                         \
        EACH_ROW(END_ROW)                                                                         \
    }
/* As assembly: with the intrinsics gcc 12 copies each sum to and fro. */
#define ADD_PRODUCT(sum, a, b) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))
MULTIPLY(multiply_int8)
#undef ADD_PRODUCT
#if defined(__AVX512BF16__)
#define ADD_PRODUCT(sum, a, b) __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))
#else
static inline __m512 first_of_pairs(__m512i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
}

static inline __m512 second_of_pairs(__m512i v) {
    return _mm512_castsi512_ps(_mm512_andnot_si512(_mm512_set1_epi32(0xffff), v));
}

static inline __m512i add_pairs(__m512i sum, __m512i a, __m512i b) {
    const __m512 one = _mm512_fmadd_ps(first_of_pairs(a), first_of_pairs(b),
                                       _mm512_castsi512_ps(sum));
    return _mm512_castps_si512(_mm512_fmadd_ps(second_of_pairs(a), second_of_pairs(b), one));
}
#define ADD_PRODUCT(sum, a, b) sum = add_pairs(sum, a, b)
#endif
MULTIPLY(multiply_bfloat16) /* offsets are 0, and so is the float with their bits */
#undef ADD_PRODUCT

static inline __attribute__((always_inline)) void offer(
    const int kind, const Dictionary *w, int64_t first, __m512i acc[TILE_ROWS][TILE_PANELS],
    const Bounds *bounds, Candidates *found) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int r = 0; r < TILE_ROWS; r++) {
        const __m512 c1 = _mm512_set1_ps(bounds[r].c1), c2 = _mm512_set1_ps(bounds[r].c2);
        const __m512 inverse = _mm512_set1_ps(bounds[r].inverse);
        const __m512 threshold = _mm512_set1_ps(found[r].threshold);
        __m512 upper[TILE_PANELS], width[TILE_PANELS];
        __mmask16 kept[TILE_PANELS];
#pragma GCC unroll 4
        for (int c = 0; c < TILE_PANELS; c++) {
            const int64_t at = first + PANEL * c;
            const __m512 sum = kind == INT8 ? _mm512_cvtepi32_ps(acc[r][c])
                                            : _mm512_castsi512_ps(acc[r][c]);
            width[c] = _mm512_mul_ps(_mm512_loadu_ps(w->slack1 + at), c1);
            if (kind == INT8)
                width[c] = _mm512_fmadd_ps(_mm512_loadu_ps(w->slack2 + at), c2, width[c]);
            upper[c] = _mm512_fmadd_ps(_mm512_loadu_ps(w->bias + at), inverse, width[c]);
            upper[c] = _mm512_fmadd_ps(sum, _mm512_loadu_ps(w->scale + at), upper[c]);
            kept[c] = _mm512_cmp_ps_mask(upper[c], threshold, _CMP_GE_OQ);
        }
        if (__builtin_expect((kept[0] | kept[1] | kept[2] | kept[3]) == 0, 1)) continue;
        Candidates *of = found + r;
        int64_t n = of->n;
#pragma GCC unroll 4
        for (int c = 0; c < TILE_PANELS; c++) {
            const __m512i latent =
                _mm512_add_epi32(lanes, _mm512_set1_epi32((int)(first + PANEL * c)));
            _mm512_storeu_ps(of->upper + n, _mm512_maskz_compress_ps(kept[c], upper[c]));
            _mm512_storeu_ps(of->width + n, _mm512_maskz_compress_ps(
                kept[c], _mm512_add_ps(width[c], width[c])));
            _mm512_storeu_si512(of->latent + n, _mm512_maskz_compress_epi32(kept[c], latent));
            n += __builtin_popcount(kept[c]);
        }
        of->n = n;
    }
}

static void score_and_offer(const Dictionary *w, int64_t first, const uint8_t *x, int64_t stride,
                            const Bounds *bounds, Candidates *found) {
    const int64_t n_groups = groups(w);
    const uint8_t *codes = (const uint8_t *)w->codes + first / PANEL * n_groups * 64;
    __m512i acc[TILE_ROWS][TILE_PANELS];
    if (w->kind == INT8) {
        multiply_int8(x, stride, codes, n_groups, w->offset + first, acc);
        offer(INT8, w, first, acc, bounds, found);
    } else {
        multiply_bfloat16(x, stride, codes, n_groups, w->offset + first, acc);
        offer(BFLOAT16, w, first, acc, bounds, found);
    }
}
#else

/* The product of one vector with one panel. */
static void score_panel(const Dictionary *w, const uint8_t *codes, const uint8_t *x,
                        const int32_t *offset, float out[PANEL]) {
    const int64_t n_groups = groups(w);
    if (w->kind == INT8) {
#if defined(WITH_AVX2)
        const __m256i ones = _mm256_set1_epi16(1);
        __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256();
        for (int64_t j = 0; j < n_groups; j++) {
            int32_t four;
            memcpy(&four, x + 4 * j, 4);
            const __m256i of_vector = _mm256_set1_epi32(four);
            const __m256i *of_latents = (const __m256i *)(codes + j * 64);
            low = _mm256_add_epi32(low, _mm256_madd_epi16(
                _mm256_maddubs_epi16(of_vector, _mm256_loadu_si256(of_latents)), ones));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(
                _mm256_maddubs_epi16(of_vector, _mm256_loadu_si256(of_latents + 1)), ones));
        }
        int32_t sums[PANEL];
        _mm256_storeu_si256((__m256i *)sums, low);
        _mm256_storeu_si256((__m256i *)(sums + 8), high);
#else
        int32_t sums[PANEL] = {0};
        const int8_t *q = (const int8_t *)codes;
        for (int64_t j = 0; j < n_groups; j++, q += 64)
            for (int l = 0; l < PANEL; l++)
                for (int t = 0; t < 4; t++) sums[l] += (int32_t)x[4 * j + t] * q[4 * l + t];
#endif
        for (int l = 0; l < PANEL; l++) out[l] = (float)(sums[l] - offset[l]);
    } else {
        const uint16_t *p = (const uint16_t *)x; /* the second of a pair is the upper half */
#if defined(WITH_AVX2)
        const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
        __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
        for (int64_t j = 0; j < n_groups; j++) {
            const __m256 first = _mm256_set1_ps(from_bfloat16(p[2 * j]));
            const __m256 second = _mm256_set1_ps(from_bfloat16(p[2 * j + 1]));
            const __m256i a = _mm256_loadu_si256((const __m256i *)(codes + j * 64));
            const __m256i b = _mm256_loadu_si256((const __m256i *)(codes + j * 64 + 32));
            low = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), first, low);
            high = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(b, 16)), first, high);
            low = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(a, upper)), second, low);
            high = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(b, upper)), second, high);
        }
        _mm256_storeu_ps(out, low);
        _mm256_storeu_ps(out + 8, high);
#else
        enum { PARTS = 64 / VECTOR_BYTES };
        const Ints *pairs = (const Ints *)codes;
        Floats sums[PARTS] = {{0}};
        for (int64_t j = 0; j < n_groups; j++)
            for (int c = 0; c < PARTS; c++) {
                const Ints both = pairs[j * PARTS + c];
                sums[c] += (Floats)(both << 16) * from_bfloat16(p[2 * j]);
                sums[c] += (Floats)(both & ~0xffff) * from_bfloat16(p[2 * j + 1]);
            }
        memcpy(out, sums, sizeof sums);
#endif
    }
}

static void score_and_offer(const Dictionary *w, int64_t first, const uint8_t *x, int64_t stride,
                            const Bounds *bounds, Candidates *found) {
    for (int c = 0; c < TILE_PANELS; c++) {
        const int64_t at = first + PANEL * c;
        const uint8_t *codes = (const uint8_t *)w->codes + at / PANEL * groups(w) * 64;
        for (int r = 0; r < TILE_ROWS; r++) {
            float score[PANEL];
            score_panel(w, codes, x + r * stride, w->offset + at, score);
            Candidates *of = found + r;
            for (int l = 0; l < PANEL; l++) {
                const float width =
                    w->slack1[at + l] * bounds[r].c1 + w->slack2[at + l] * bounds[r].c2;
                const float upper =
                    score[l] * w->scale[at + l] + (w->bias[at + l] * bounds[r].inverse + width);
                if (upper >= of->threshold) {
                    of->upper[of->n] = upper;
                    of->width[of->n] = 2 * width;
                    of->latent[of->n++] = (int32_t)(at + l);
                }
            }
        }
    }
}
#endif

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

/* Raise the threshold to what k candidates surely reach, and drop those that surely do not. */
static void drop_hopeless(Candidates *of, int64_t k, float *lower) {
    if (of->n < k) return;
    for (int64_t i = 0; i < of->n; i++) lower[i] = of->upper[i] - of->width[i];
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
