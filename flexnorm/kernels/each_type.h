/* Includes the C file named SELF once for every type: T of the values, A of sums and tables, NAME(base) of the
 * functions; WIDE is defined where the two are the same. What all types share comes first. */
#include <math.h>
#include <stdint.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 1024 /* values summed in the accumulation type before they are added in double */
#define LANES 32   /* partial sums side by side: no reduction waits for the one before */
#define TILE 64    /* rows summed at once, of so many channels that all stay in the fastest cache */
#define CHANNELS 128

typedef int64_t i64;
typedef uint16_t bf16;

static inline i64 smaller(i64 a, i64 b) { return a < b ? a : b; }

static inline float load_bf16(bf16 v) { uint32_t u = (uint32_t)v << 16; float f; memcpy(&f, &u, 4); return f; }
static inline bf16 store_bf16(float f) {
  uint32_t u; memcpy(&u, &f, 4);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (bf16)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

/* Sum of LANES partial sums. */
static inline float join_float(const float *u) {
  float w[8]; for (int l = 0; l < 8; l++) w[l] = (u[l] + u[l + 8]) + (u[l + 16] + u[l + 24]);
  return ((w[0] + w[4]) + (w[2] + w[6])) + ((w[1] + w[5]) + (w[3] + w[7]));
}
static inline double join_double(const double *u) {
  double w[8]; for (int l = 0; l < 8; l++) w[l] = (u[l] + u[l + 8]) + (u[l + 16] + u[l + 24]);
  return ((w[0] + w[4]) + (w[2] + w[6])) + ((w[1] + w[5]) + (w[3] + w[7]));
}

#define PARALLEL _Pragma("omp parallel for schedule(static) num_threads(threads)")
#define SIMD _Pragma("omp simd")
/* From the last to the first, of those that each thread has: a pass reads first what the one before it, which went the
 * other way, has left in the cache. */
#define BACKWARDS(i, count) \
  PARALLEL for (int part = 0; part < threads; part++) \
    for (i64 i = (count) * (part + 1) / threads - 1; i >= (count) * part / threads; i--)
#define ADDING(...) _Pragma(TEXT(omp simd reduction(+:__VA_ARGS__)))
#define TEXT(...) #__VA_ARGS__
#define ALWAYS static inline __attribute__((always_inline))
/* Some rows at once: a partial sum is read and written once for all of them. */
#define BY_FOUR(i, count, work) { i64 i = 0; for (; i + 4 <= (count); i += 4) work(i, 4) for (; i < (count); i++) work(i, 1) }
#define PASTE(base, suffix) base##_##suffix
#define EXPAND(base, suffix) PASTE(base, suffix)
#define NAME(base) EXPAND(base, SUFFIX)

#define A float
#define JOIN join_float
#define LOAD(v) (v)
#define STORE(v) (v)

#define T float
#define SUFFIX f32
#define WIDE
#include SELF
#undef WIDE
#undef T
#undef SUFFIX

#ifdef __FLT16_MAX__
#define T _Float16
#define SUFFIX f16
#include SELF
#undef T
#undef SUFFIX
#endif

#undef LOAD
#undef STORE
#define LOAD(v) load_bf16(v)
#define STORE(v) store_bf16(v)
#define T bf16
#define SUFFIX bf16
#include SELF
#undef T
#undef SUFFIX

#undef LOAD
#undef STORE
#undef A
#undef JOIN
#define A double
#define JOIN join_double
#define LOAD(v) (v)
#define STORE(v) (v)
#define T double
#define SUFFIX f64
#define WIDE
#include SELF
