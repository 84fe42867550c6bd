#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

typedef void (*OpenMP)(void (*share)(void *), void *job, unsigned threads, unsigned flags);

static OpenMP openmp = NULL;

static void forget_openmp(void) { /* GNU's hangs in the child of a fork */
    openmp = NULL;
}

API void sparsight_use_openmp(OpenMP parallel) {
    openmp = parallel;
    pthread_atfork(NULL, NULL, forget_openmp);
}

typedef struct {
    void (*body)(void *, int64_t);
    void *context;
    int64_t n;
    atomic_llong next;
} Job;

static void share_job(void *context) {
    Job *job = context;
    for (int64_t i; (i = atomic_fetch_add(&job->next, 1)) < job->n;) job->body(job->context, i);
}

#define LONGEST_POOL 256
#define SCRATCH_SLOTS 5
#define SPINS 4000

static pthread_mutex_t one_loop = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER;
static pthread_cond_t finished = PTHREAD_COND_INITIALIZER;
static int n_workers = 0;

static struct {
    void (*body)(void *, int64_t);
    void *context;
    int64_t n;
    int wanted; /* workers that may still join */
    int running;
} loop;
static atomic_llong next_index;
static atomic_uint generation;

static void forget_workers(void) { /* in the child of a fork there are none */
    n_workers = 0;
    loop.running = 0;
    loop.wanted = 0;
    pthread_mutex_init(&one_loop, NULL);
    pthread_mutex_init(&guard, NULL);
    pthread_cond_init(&work, NULL);
    pthread_cond_init(&finished, NULL);
}

static void run_share(void (*body)(void *, int64_t), void *context, int64_t n) {
    for (;;) {
        int64_t i = atomic_fetch_add(&next_index, 1);
        if (i >= n) return;
        body(context, i);
    }
}

static void *worker(void *unused) {
    unsigned seen = 0;
    (void)unused;
    for (;;) {
        for (int spin = 0; spin < SPINS && atomic_load(&generation) == seen; spin++) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        pthread_mutex_lock(&guard);
        while (atomic_load(&generation) == seen || loop.wanted == 0) {
            seen = atomic_load(&generation);
            pthread_cond_wait(&work, &guard);
        }
        seen = atomic_load(&generation);
        loop.wanted--;
        loop.running++;
        void (*body)(void *, int64_t) = loop.body;
        void *context = loop.context;
        int64_t n = loop.n;
        pthread_mutex_unlock(&guard);
        run_share(body, context, n);
        pthread_mutex_lock(&guard);
        if (--loop.running == 0) pthread_cond_signal(&finished);
        pthread_mutex_unlock(&guard);
    }
    return NULL;
}

static void grow_to(int wanted) {
    static int prepared = 0;
    if (!prepared) {
        pthread_atfork(NULL, NULL, forget_workers);
        prepared = 1;
    }
    while (n_workers < wanted && n_workers < LONGEST_POOL) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, NULL) != 0) return;
        pthread_detach(thread);
        n_workers++;
    }
}

void parallel_for(int64_t n, int threads, void (*body)(void *, int64_t), void *context) {
    if (threads <= 1 || n <= 1) {
        for (int64_t i = 0; i < n; i++) body(context, i);
        return;
    }
    if (openmp) {
        Job job = {body, context, n, 0}; /* for all: GNU's ends threads that a loop has no use for */
        openmp(share_job, &job, (unsigned)threads, 0);
        return;
    }
    if (threads > n) threads = (int)n;
    pthread_mutex_lock(&one_loop);
    grow_to(threads - 1);
    pthread_mutex_lock(&guard);
    loop.body = body;
    loop.context = context;
    loop.n = n;
    loop.wanted = threads - 1;
    atomic_store(&next_index, 0);
    atomic_fetch_add(&generation, 1);
    pthread_cond_broadcast(&work);
    pthread_mutex_unlock(&guard);
    run_share(body, context, n);
    pthread_mutex_lock(&guard);
    loop.wanted = 0; /* who comes now is too late */
    while (loop.running > 0) pthread_cond_wait(&finished, &guard);
    pthread_mutex_unlock(&guard);
    pthread_mutex_unlock(&one_loop);
}

typedef struct {
    void *kept[SCRATCH_SLOTS];
    int64_t sizes[SCRATCH_SLOTS];
} Scratch;

static pthread_key_t key;
static pthread_once_t key_made = PTHREAD_ONCE_INIT;

static void free_scratch(void *of_thread) {
    Scratch *mine = of_thread;
    for (int slot = 0; slot < SCRATCH_SLOTS; slot++) free(mine->kept[slot]);
    free(mine);
}

static void make_key(void) {
    if (pthread_key_create(&key, free_scratch) != 0) abort();
}

void *scratch(int slot, int64_t bytes) {
    static _Thread_local Scratch *mine = NULL;
    if (mine == NULL) {
        pthread_once(&key_made, make_key);
        mine = calloc(1, sizeof *mine);
        if (mine == NULL || pthread_setspecific(key, mine) != 0) abort();
    }
    if (mine->sizes[slot] < bytes) {
        free(mine->kept[slot]);
        mine->sizes[slot] = (bytes + 4095) / 4096 * 4096;
        mine->kept[slot] = aligned_alloc(4096, (size_t)mine->sizes[slot]);
        if (mine->kept[slot] == NULL) abort();
    }
    return mine->kept[slot];
}
