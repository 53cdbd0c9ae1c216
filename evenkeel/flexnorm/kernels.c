/* The four passes that every normalization shares, for an activation x seen as N samples, C channels, P positions.
 *
 *   moments   mean[n,c], var[n,c]            of x over the positions (two passes per slab that stays in cache)
 *   affine    y  = scale * x + shift
 *   sums      s1 = sum g * (x - m), s0 = sum g
 *   combine   dx = scale * g + a + b * (x - m)
 *
 * Two layouts: "rows" (N, C, P contiguous: one row of P values per table entry) and "cols" (N, P, C contiguous:
 * channels last). Tables are dense (N, C) in the accumulation type, except scale and shift, which come with two
 * strides so that a (1, C) or (N, 1) table needs no copy. Sums are taken in short blocks that are added in double,
 * so their error does not grow with P. Plain C with OpenMP: compiles in about a second, needs no headers of torch.
 */
#include <stdint.h>
#include <stddef.h>
#include <string.h>

#define BLOCK 1024  /* values summed in the accumulation type before they are added in double */
#define CB 256      /* channels handled at once in the channels-last layout */
#define PB 64       /* positions summed at once in the channels-last layout */

typedef int64_t i64;
typedef uint16_t bf16;

static inline float load_bf16(bf16 v) { uint32_t u = (uint32_t)v << 16; float f; memcpy(&f, &u, 4); return f; }
static inline bf16 store_bf16(float f) {
  uint32_t u; memcpy(&u, &f, 4);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (bf16)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
#define LOAD_ID(v) (v)
#define STORE_ID(v) (v)

#define DEFINE(NAME, T, A, LD, ST)                                                                                   \
void moments_rows_##NAME(const T *x, A *mean, A *var, i64 N, i64 C, i64 P, int threads) {                            \
  i64 R = N * C;                                                                                                     \
  _Pragma("omp parallel for schedule(static) num_threads(threads)")                                                  \
  for (i64 r = 0; r < R; r++) {                                                                                      \
    const T *row = x + r * P;                                                                                        \
    double total = 0;                                                                                                \
    for (i64 p0 = 0; p0 < P; p0 += BLOCK) {                                                                          \
      i64 p1 = p0 + BLOCK < P ? p0 + BLOCK : P; A s = 0;                                                             \
      _Pragma("omp simd reduction(+:s)") for (i64 p = p0; p < p1; p++) s += LD(row[p]);                              \
      total += s;                                                                                                    \
    }                                                                                                                \
    A m = (A)(total / P); double square = 0, rest = 0;                                                               \
    for (i64 p0 = 0; p0 < P; p0 += BLOCK) {                                                                          \
      i64 p1 = p0 + BLOCK < P ? p0 + BLOCK : P; A s = 0, e = 0;                                                      \
      _Pragma("omp simd reduction(+:s,e)") for (i64 p = p0; p < p1; p++) { A d = LD(row[p]) - m; s += d * d; e += d; } \
      square += s; rest += e;                                                                                        \
    }                                                                                                                \
    double off = rest / P;                                                                                           \
    mean[r] = (A)(m + off);                                                                                          \
    double v = square / P - off * off; var[r] = (A)(v < 0 ? 0 : v);                                                  \
  }                                                                                                                  \
}                                                                                                                    \
void affine_rows_##NAME(const T *x, const A *scale, i64 sn, i64 sc, const A *shift, i64 hn, i64 hc, T *y,            \
                        i64 N, i64 C, i64 P, int threads) {                                                          \
  i64 R = N * C;                                                                                                     \
  _Pragma("omp parallel for schedule(static) num_threads(threads)")                                                  \
  for (i64 r = 0; r < R; r++) {                                                                                      \
    i64 n = r / C, c = r % C; const A s = scale[n * sn + c * sc], h = shift ? shift[n * hn + c * hc] : 0;             \
    const T *row = x + r * P; T *out = y + r * P;                                                                    \
    _Pragma("omp simd") for (i64 p = 0; p < P; p++) out[p] = ST(s * LD(row[p]) + h);                                 \
  }                                                                                                                  \
}                                                                                                                    \
void sums_rows_##NAME(const T *g, const T *x, const A *m, A *s1, A *s0, i64 N, i64 C, i64 P, int threads) {          \
  i64 R = N * C;                                                                                                     \
  _Pragma("omp parallel for schedule(static) num_threads(threads)")                                                  \
  for (i64 r = 0; r < R; r++) {                                                                                      \
    const T *gr = g + r * P, *xr = x + r * P; A c = m ? m[r] : 0; double t1 = 0, t0 = 0;                             \
    for (i64 p0 = 0; p0 < P; p0 += BLOCK) {                                                                          \
      i64 p1 = p0 + BLOCK < P ? p0 + BLOCK : P; A u1 = 0, u0 = 0;                                                    \
      _Pragma("omp simd reduction(+:u1,u0)")                                                                         \
      for (i64 p = p0; p < p1; p++) { A v = LD(gr[p]); u1 += v * (LD(xr[p]) - c); u0 += v; }                         \
      t1 += u1; t0 += u0;                                                                                            \
    }                                                                                                                \
    s1[r] = (A)t1; s0[r] = (A)t0;                                                                                    \
  }                                                                                                                  \
}                                                                                                                    \
void combine_rows_##NAME(const T *g, const T *x, const A *scale, i64 sn, i64 sc, const A *a, const A *b, const A *m, \
                         T *dx, i64 N, i64 C, i64 P, int threads) {                                                  \
  i64 R = N * C;                                                                                                     \
  _Pragma("omp parallel for schedule(static) num_threads(threads)")                                                  \
  for (i64 r = 0; r < R; r++) {                                                                                      \
    const A s = scale[(r / C) * sn + (r % C) * sc], ar = a[r], br = b[r], c = m[r];                                  \
    const T *gr = g + r * P, *xr = x + r * P; T *out = dx + r * P;                                                   \
    _Pragma("omp simd") for (i64 p = 0; p < P; p++) out[p] = ST(s * LD(gr[p]) + ar + br * (LD(xr[p]) - c));          \
  }                                                                                                                  \
}                                                                                                                    \
void moments_cols_##NAME(const T *x, A *mean, A *var, i64 N, i64 C, i64 P, int threads) {                            \
  i64 blocks = (C + CB - 1) / CB, tasks = N * blocks;                                                                \
  _Pragma("omp parallel for schedule(static) num_threads(threads)")                                                  \
  for (i64 t = 0; t < tasks; t++) {                                                                                  \
    i64 n = t / blocks, c0 = (t % blocks) * CB, w = C - c0 < CB ? C - c0 : CB;                                       \
    const T *slab = x + n * P * C + c0; double total[CB], square[CB]; A m[CB], s[CB], e[CB];                         \
    for (i64 c = 0; c < w; c++) total[c] = 0;                                                                        \
    for (i64 p0 = 0; p0 < P; p0 += PB) {                                                                             \
      i64 p1 = p0 + PB < P ? p0 + PB : P;                                                                            \
      for (i64 c = 0; c < w; c++) s[c] = 0;                                                                          \
      for (i64 p = p0; p < p1; p++) { const T *q = slab + p * C;                                                     \
        _Pragma("omp simd") for (i64 c = 0; c < w; c++) s[c] += LD(q[c]); }                                          \
      for (i64 c = 0; c < w; c++) total[c] += s[c];                                                                  \
    }                                                                                                                \
    for (i64 c = 0; c < w; c++) { m[c] = (A)(total[c] / P); total[c] = 0; square[c] = 0; }                           \
    for (i64 p0 = 0; p0 < P; p0 += PB) {                                                                             \
      i64 p1 = p0 + PB < P ? p0 + PB : P;                                                                            \
      for (i64 c = 0; c < w; c++) { s[c] = 0; e[c] = 0; }                                                            \
      for (i64 p = p0; p < p1; p++) { const T *q = slab + p * C;                                                     \
        _Pragma("omp simd") for (i64 c = 0; c < w; c++) { A d = LD(q[c]) - m[c]; s[c] += d * d; e[c] += d; } }       \
      for (i64 c = 0; c < w; c++) { square[c] += s[c]; total[c] += e[c]; }                                           \
    }                                                                                                                \
    for (i64 c = 0; c < w; c++) {                                                                                    \
      double off = total[c] / P, v = square[c] / P - off * off;                                                      \
      mean[n * C + c0 + c] = (A)(m[c] + off); var[n * C + c0 + c] = (A)(v < 0 ? 0 : v);                              \
    }                                                                                                                \
  }                                                                                                                  \
}                                                                                                                    \
void affine_cols_##NAME(const T *x, const A *scale, i64 sn, i64 sc, const A *shift, i64 hn, i64 hc, T *y,            \
                        i64 N, i64 C, i64 P, int threads) {                                                          \
  i64 parts = (P + PB - 1) / PB, tasks = N * parts;                                                                  \
  _Pragma("omp parallel for schedule(static) num_threads(threads)")                                                  \
  for (i64 t = 0; t < tasks; t++) {                                                                                  \
    i64 n = t / parts, p0 = (t % parts) * PB, p1 = p0 + PB < P ? p0 + PB : P; A s[CB], h[CB];                        \
    for (i64 c0 = 0; c0 < C; c0 += CB) {                                                                             \
      i64 w = C - c0 < CB ? C - c0 : CB;                                                                             \
      for (i64 c = 0; c < w; c++) { s[c] = scale[n * sn + (c0 + c) * sc]; h[c] = shift ? shift[n * hn + (c0 + c) * hc] : 0; } \
      for (i64 p = p0; p < p1; p++) { const T *q = x + (n * P + p) * C + c0; T *o = y + (n * P + p) * C + c0;        \
        _Pragma("omp simd") for (i64 c = 0; c < w; c++) o[c] = ST(s[c] * LD(q[c]) + h[c]); }                         \
    }                                                                                                                \
  }                                                                                                                  \
}                                                                                                                    \
void sums_cols_##NAME(const T *g, const T *x, const A *m, A *s1, A *s0, i64 N, i64 C, i64 P, int threads) {          \
  i64 blocks = (C + CB - 1) / CB, tasks = N * blocks;                                                                \
  _Pragma("omp parallel for schedule(static) num_threads(threads)")                                                  \
  for (i64 t = 0; t < tasks; t++) {                                                                                  \
    i64 n = t / blocks, c0 = (t % blocks) * CB, w = C - c0 < CB ? C - c0 : CB;                                       \
    double t1[CB], t0[CB]; A u1[CB], u0[CB], k[CB];                                                                  \
    for (i64 c = 0; c < w; c++) { t1[c] = 0; t0[c] = 0; k[c] = m ? m[n * C + c0 + c] : 0; }                          \
    for (i64 p0 = 0; p0 < P; p0 += PB) {                                                                             \
      i64 p1 = p0 + PB < P ? p0 + PB : P;                                                                            \
      for (i64 c = 0; c < w; c++) { u1[c] = 0; u0[c] = 0; }                                                          \
      for (i64 p = p0; p < p1; p++) { const T *gq = g + (n * P + p) * C + c0, *xq = x + (n * P + p) * C + c0;        \
        _Pragma("omp simd") for (i64 c = 0; c < w; c++) { A v = LD(gq[c]); u1[c] += v * (LD(xq[c]) - k[c]); u0[c] += v; } } \
      for (i64 c = 0; c < w; c++) { t1[c] += u1[c]; t0[c] += u0[c]; }                                                \
    }                                                                                                                \
    for (i64 c = 0; c < w; c++) { s1[n * C + c0 + c] = (A)t1[c]; s0[n * C + c0 + c] = (A)t0[c]; }                    \
  }                                                                                                                  \
}                                                                                                                    \
void combine_cols_##NAME(const T *g, const T *x, const A *scale, i64 sn, i64 sc, const A *a, const A *b, const A *m, \
                         T *dx, i64 N, i64 C, i64 P, int threads) {                                                  \
  i64 parts = (P + PB - 1) / PB, tasks = N * parts;                                                                  \
  _Pragma("omp parallel for schedule(static) num_threads(threads)")                                                  \
  for (i64 t = 0; t < tasks; t++) {                                                                                  \
    i64 n = t / parts, p0 = (t % parts) * PB, p1 = p0 + PB < P ? p0 + PB : P; A s[CB];                               \
    for (i64 c0 = 0; c0 < C; c0 += CB) {                                                                             \
      i64 w = C - c0 < CB ? C - c0 : CB;                                                                             \
      const A *aq = a + n * C + c0, *bq = b + n * C + c0, *mq = m + n * C + c0;                                      \
      for (i64 c = 0; c < w; c++) s[c] = scale[n * sn + (c0 + c) * sc];                                              \
      for (i64 p = p0; p < p1; p++) {                                                                                \
        const T *gq = g + (n * P + p) * C + c0, *xq = x + (n * P + p) * C + c0; T *o = dx + (n * P + p) * C + c0;    \
        _Pragma("omp simd") for (i64 c = 0; c < w; c++) o[c] = ST(s[c] * LD(gq[c]) + aq[c] + bq[c] * (LD(xq[c]) - mq[c])); } \
    }                                                                                                                \
  }                                                                                                                  \
}

DEFINE(f32, float, float, LOAD_ID, STORE_ID)
DEFINE(f64, double, double, LOAD_ID, STORE_ID)
DEFINE(bf16, bf16, float, load_bf16, store_bf16)
#ifdef __FLT16_MAX__
DEFINE(f16, _Float16, float, LOAD_ID, STORE_ID)
#endif
