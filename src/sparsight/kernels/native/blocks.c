#include "blocks.h"
#include "pool.h"

#include <string.h>

typedef struct {
    const int32_t *latents; /* [n_vectors, k]; behind the last of a vector -1 */
    int64_t n_vectors, n_latents, k;
    Blocks *out;
} Ordering;

static inline int64_t end_of(const Ordering *of, int64_t task) {
    const int64_t end = (task + 1) * BLOCK;
    return end < of->n_vectors ? end : of->n_vectors;
}

/* Tasks share no block. */
static void count_entries(void *context, int64_t task) {
    const Ordering *of = context;
    int32_t *counts = of->out->starts + task * of->n_latents;
    for (int64_t e = task * BLOCK * of->k; e < end_of(of, task) * of->k; e++)
        if (of->latents[e] >= 0) counts[of->latents[e]]++;
}

static void place_entries(void *context, int64_t task) {
    const Ordering *of = context;
    int32_t *next = of->out->starts + task * of->n_latents;
    for (int64_t v = task * BLOCK; v < end_of(of, task); v++)
        for (int64_t e = v * of->k; e < (v + 1) * of->k; e++) {
            if (of->latents[e] < 0) continue;
            const int32_t to = next[of->latents[e]]++;
            of->out->columns[to] = (int32_t)v;
            of->out->entries[to] = (int32_t)e;
        }
}

/* Put the entries of a code, k a vector, into blocks of vectors; those of a latent stay in order. */
API void sparsight_blocks_by_latent(const int32_t *latents, int64_t n_vectors, int64_t k,
                                    int64_t n_latents, Blocks *out, int threads) {
    Ordering of = {latents, n_vectors, n_latents, k, out};
    const int64_t tasks = (n_vectors + BLOCK - 1) / BLOCK, cells = tasks * n_latents;
    memset(out->starts, 0, (size_t)(cells + 1) * 4);
    parallel_for(tasks, threads, count_entries, &of);
    int32_t place = 0;
    for (int64_t i = 0; i < cells; i++) {
        const int32_t count = out->starts[i];
        out->starts[i] = place;
        place += count;
    }
    parallel_for(tasks, threads, place_entries, &of); /* which leaves the ends in the starts */
    memmove(out->starts + 1, out->starts, (size_t)cells * 4);
    out->starts[0] = 0;
}

static void find_starts(void *context, int64_t task) {
    const Ordering *of = context;
    const int64_t blocks = (of->n_latents + BLOCK - 1) / BLOCK;
    for (int64_t v = task * BLOCK; v < end_of(of, task); v++) {
        const int32_t *latents = of->latents + v * of->k;
        int64_t e = 0;
        for (int64_t block = 0; block <= blocks; block++) {
            while (e < of->k && latents[e] >= 0 && latents[e] < block * BLOCK) e++;
            of->out->starts[block * of->n_vectors + v] = (int32_t)(v * of->k + e);
        }
    }
}

/* Find where blocks of latents begin in a code whose latents rise. */
API void sparsight_blocks_by_vector(const int32_t *latents, int64_t n_vectors, int64_t k,
                                    int64_t n_latents, Blocks *out, int threads) {
    Ordering of = {latents, n_vectors, n_latents, k, out};
    parallel_for((n_vectors + BLOCK - 1) / BLOCK, threads, find_starts, &of);
}
