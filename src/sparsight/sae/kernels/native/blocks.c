#include "blocks.h"
#include "pool.h"

#include <string.h>

typedef struct {
    const int32_t *latents; /* [n_vectors, k]; -1 where there is none */
    int64_t n_vectors, n_latents, k;
    int by_latent; /* whether latents are the rows of the matrix, else vectors */
    Blocks *out;
} Ordering;

/* The block and row that an entry belongs to. */
static inline int64_t cell(const Ordering *of, int64_t vector, int64_t latent) {
    if (of->by_latent) return vector / BLOCK * of->n_latents + latent;
    return latent / BLOCK * of->n_vectors + vector;
}

static inline int64_t end_of(const Ordering *of, int64_t task) {
    const int64_t end = (task + 1) * BLOCK;
    return end < of->n_vectors ? end : of->n_vectors;
}

/* Tasks share no cell: those of a vector, or of a block of vectors, are counted by one. */
static void count_entries(void *context, int64_t task) {
    const Ordering *of = context;
    for (int64_t v = task * BLOCK; v < end_of(of, task); v++)
        for (int64_t e = v * of->k; e < (v + 1) * of->k; e++)
            if (of->latents[e] >= 0) of->out->starts[cell(of, v, of->latents[e])]++;
}

static void place_entries(void *context, int64_t task) {
    const Ordering *of = context;
    for (int64_t v = task * BLOCK; v < end_of(of, task); v++)
        for (int64_t e = v * of->k; e < (v + 1) * of->k; e++) {
            if (of->latents[e] < 0) continue;
            const int32_t to = of->out->starts[cell(of, v, of->latents[e])]++;
            of->out->columns[to] = of->by_latent ? (int32_t)v : of->latents[e];
            of->out->entries[to] = (int32_t)e;
        }
}

/* Put the entries of a code, k a vector, into blocks; those of a cell stay in their order. */
__attribute__((visibility("default"))) void sparsight_order_blocks(
    const int32_t *latents, int64_t n_vectors, int64_t n_latents, int64_t k, int by_latent,
    Blocks *out, int threads) {
    Ordering of = {latents, n_vectors, n_latents, k, by_latent, out};
    const int64_t tasks = (n_vectors + BLOCK - 1) / BLOCK;
    const int64_t cells = (out->n_columns + BLOCK - 1) / BLOCK * out->n_rows;
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
