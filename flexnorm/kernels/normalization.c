/* The four passes that every normalization shares, for an activation x seen as N samples, C channels, P positions,
 * and the tables between them.
 *
 *   moments   mean[n,c], var[n,c]            of x over the positions (two passes per slab that stays in cache)
 *   affine    y  = scale * x + shift
 *   sums      s1 = sum g * x, s0 = sum g     taken about a center m: s1 = sum g * (x - m) + m * s0
 *   combine   dx = scale * g + ca * a + cb * b * (x - m)
 *   pool      mean[c], var[c]                over the samples, by Chan's formula; and its backward
 *   fold      sum over the samples           of two tables
 *   track     running statistics             of a pooled batch; a batch with a non-finite channel is left out
 *   unitize   scale, shift                   of unitized batch normalization; and its backward
 *
 * Two layouts: "rows" (N, C, P contiguous: one row of P values per table entry) and "cols" (N, P, C contiguous:
 * channels last). Tables are dense (N, C) in the accumulation type, except those that come with two strides, so that a
 * (1, C) or (N, 1) table needs no copy. Sums are taken in short blocks that are added in double, so that their error
 * does not grow with P. Plain C with OpenMP: compiles in a second or two, needs no headers of torch.
 */
#include <math.h>
#include <stdint.h>
#include <stddef.h>
#include <string.h>

#define BLOCK 1024  /* values summed in the accumulation type before they are added in double */
#define LANES 32    /* partial sums side by side: no reduction waits for the one before */
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


/* Sum of LANES partial sums. */
static inline float join_f(const float *u) {
  float w[8]; for (int l = 0; l < 8; l++) w[l] = (u[l] + u[l + 8]) + (u[l + 16] + u[l + 24]);
  return ((w[0] + w[4]) + (w[2] + w[6])) + ((w[1] + w[5]) + (w[3] + w[7]));
}
static inline double join_d(const double *u) {
  double w[8]; for (int l = 0; l < 8; l++) w[l] = (u[l] + u[l + 8]) + (u[l + 16] + u[l + 24]);
  return ((w[0] + w[4]) + (w[2] + w[6])) + ((w[1] + w[5]) + (w[3] + w[7]));
}

#define DEFINE(NAME, T, A, JOIN, LD, ST) \
void moments_rows_##NAME(const T *x, A *mean, A *var, i64 N, i64 C, i64 P, int threads) { \
  i64 R = N * C; const double inverse = 1.0 / (double)P; \
  _Pragma("omp parallel for schedule(static) num_threads(threads)") \
  for (i64 r = 0; r < R; r++) { \
    const T *row = x + r * P; double total = 0, square = 0, rest = 0; \
    for (i64 p0 = 0; p0 < P; p0 += BLOCK) { \
      i64 p1 = p0 + BLOCK < P ? p0 + BLOCK : P, p = p0; A u[LANES] = {0}, tail = 0; \
      for (; p + LANES <= p1; p += LANES) for (int l = 0; l < LANES; l++) u[l] += LD(row[p + l]); \
      for (; p < p1; p++) tail += LD(row[p]); \
      total += JOIN(u) + tail; \
    } \
    A m = (A)(total * inverse); \
    for (i64 p0 = 0; p0 < P; p0 += BLOCK) { \
      i64 p1 = p0 + BLOCK < P ? p0 + BLOCK : P, p = p0; A u[LANES] = {0}, w[LANES] = {0}, tu = 0, tw = 0; \
      for (; p + LANES <= p1; p += LANES) \
        for (int l = 0; l < LANES; l++) { A d = LD(row[p + l]) - m; u[l] += d * d; w[l] += d; } \
      for (; p < p1; p++) { A d = LD(row[p]) - m; tu += d * d; tw += d; } \
      square += JOIN(u) + tu; rest += JOIN(w) + tw; \
    } \
    double off = rest * inverse, v = square * inverse - off * off; \
    mean[r] = (A)(m + off); var[r] = (A)(v < 0 ? 0 : v); \
  } \
} \
void affine_rows_##NAME(const T *x, const A *scale, i64 sn, i64 sc, const A *shift, i64 hn, i64 hc, T *y, \
                        i64 N, i64 C, i64 P, int threads) { \
  i64 R = N * C; \
  _Pragma("omp parallel for schedule(static) num_threads(threads)") \
  for (i64 r = 0; r < R; r++) { \
    i64 n = r / C, c = r % C; const A s = scale[n * sn + c * sc], h = shift ? shift[n * hn + c * hc] : 0; \
    const T *row = x + r * P; T *out = y + r * P; \
    _Pragma("omp simd") for (i64 p = 0; p < P; p++) out[p] = ST(s * LD(row[p]) + h); \
  } \
} \
void sums_rows_##NAME(const T *g, const T *x, const A *m, A *s1, A *s0, i64 N, i64 C, i64 P, int threads) { \
  i64 R = N * C; \
  _Pragma("omp parallel for schedule(static) num_threads(threads)") \
  for (i64 r = 0; r < R; r++) { \
    const T *gr = g + r * P, *xr = x + r * P; A c = m ? m[r] : 0; double t1 = 0, t0 = 0; \
    for (i64 p0 = 0; p0 < P; p0 += BLOCK) { \
      i64 p1 = p0 + BLOCK < P ? p0 + BLOCK : P, p = p0; A u[LANES] = {0}, w[LANES] = {0}, tu = 0, tw = 0; \
      for (; p + LANES <= p1; p += LANES) \
        for (int l = 0; l < LANES; l++) { A v = LD(gr[p + l]); u[l] += v * (LD(xr[p + l]) - c); w[l] += v; } \
      for (; p < p1; p++) { A v = LD(gr[p]); tu += v * (LD(xr[p]) - c); tw += v; } \
      t1 += JOIN(u) + tu; t0 += JOIN(w) + tw; \
    } \
    s1[r] = (A)(t1 + c * t0); s0[r] = (A)t0; \
  } \
} \
void combine_rows_##NAME(const T *g, const T *x, const A *scale, i64 sn, i64 sc, const A *a, i64 an, i64 ac, double ca, \
                         const A *b, i64 bn, i64 bc, double cb, const A *m, T *dx, i64 N, i64 C, i64 P, int threads) { \
  i64 R = N * C; \
  _Pragma("omp parallel for schedule(static) num_threads(threads)") \
  for (i64 r = 0; r < R; r++) { \
    i64 n = r / C, k = r % C; const A s = scale[n * sn + k * sc], c = m[r]; \
    const A ar = a ? (A)(ca * a[n * an + k * ac]) : 0, br = b ? (A)(cb * b[n * bn + k * bc]) : 0; \
    const T *gr = g + r * P, *xr = x + r * P; T *out = dx + r * P; \
    _Pragma("omp simd") for (i64 p = 0; p < P; p++) out[p] = ST(s * LD(gr[p]) + ar + br * (LD(xr[p]) - c)); \
  } \
} \
void moments_cols_##NAME(const T *x, A *mean, A *var, i64 N, i64 C, i64 P, int threads) { \
  i64 blocks = (C + CB - 1) / CB, tasks = N * blocks; const double inverse = 1.0 / (double)P; \
  _Pragma("omp parallel for schedule(static) num_threads(threads)") \
  for (i64 t = 0; t < tasks; t++) { \
    i64 n = t / blocks, c0 = (t % blocks) * CB, w = C - c0 < CB ? C - c0 : CB; \
    const T *slab = x + n * P * C + c0; double total[CB], square[CB]; A m[CB], s[CB], e[CB]; \
    for (i64 c = 0; c < w; c++) total[c] = 0; \
    for (i64 p0 = 0; p0 < P; p0 += PB) { \
      i64 p1 = p0 + PB < P ? p0 + PB : P; \
      for (i64 c = 0; c < w; c++) s[c] = 0; \
      for (i64 p = p0; p < p1; p++) { const T *q = slab + p * C; \
        _Pragma("omp simd") for (i64 c = 0; c < w; c++) s[c] += LD(q[c]); } \
      for (i64 c = 0; c < w; c++) total[c] += s[c]; \
    } \
    for (i64 c = 0; c < w; c++) { m[c] = (A)(total[c] * inverse); total[c] = 0; square[c] = 0; } \
    for (i64 p0 = 0; p0 < P; p0 += PB) { \
      i64 p1 = p0 + PB < P ? p0 + PB : P; \
      for (i64 c = 0; c < w; c++) { s[c] = 0; e[c] = 0; } \
      for (i64 p = p0; p < p1; p++) { const T *q = slab + p * C; \
        _Pragma("omp simd") for (i64 c = 0; c < w; c++) { A d = LD(q[c]) - m[c]; s[c] += d * d; e[c] += d; } } \
      for (i64 c = 0; c < w; c++) { square[c] += s[c]; total[c] += e[c]; } \
    } \
    for (i64 c = 0; c < w; c++) { \
      double off = total[c] * inverse, v = square[c] * inverse - off * off; \
      mean[n * C + c0 + c] = (A)(m[c] + off); var[n * C + c0 + c] = (A)(v < 0 ? 0 : v); \
    } \
  } \
} \
void affine_cols_##NAME(const T *x, const A *scale, i64 sn, i64 sc, const A *shift, i64 hn, i64 hc, T *y, \
                        i64 N, i64 C, i64 P, int threads) { \
  i64 parts = (P + PB - 1) / PB, tasks = N * parts; \
  _Pragma("omp parallel for schedule(static) num_threads(threads)") \
  for (i64 t = 0; t < tasks; t++) { \
    i64 n = t / parts, p0 = (t % parts) * PB, p1 = p0 + PB < P ? p0 + PB : P; A s[CB], h[CB]; \
    for (i64 c0 = 0; c0 < C; c0 += CB) { \
      i64 w = C - c0 < CB ? C - c0 : CB; \
      for (i64 c = 0; c < w; c++) { \
        s[c] = scale[n * sn + (c0 + c) * sc]; h[c] = shift ? shift[n * hn + (c0 + c) * hc] : 0; } \
      for (i64 p = p0; p < p1; p++) { const T *q = x + (n * P + p) * C + c0; T *o = y + (n * P + p) * C + c0; \
        _Pragma("omp simd") for (i64 c = 0; c < w; c++) o[c] = ST(s[c] * LD(q[c]) + h[c]); } \
    } \
  } \
} \
void sums_cols_##NAME(const T *g, const T *x, const A *m, A *s1, A *s0, i64 N, i64 C, i64 P, int threads) { \
  i64 blocks = (C + CB - 1) / CB, tasks = N * blocks; \
  _Pragma("omp parallel for schedule(static) num_threads(threads)") \
  for (i64 t = 0; t < tasks; t++) { \
    i64 n = t / blocks, c0 = (t % blocks) * CB, w = C - c0 < CB ? C - c0 : CB; \
    double t1[CB], t0[CB]; A u1[CB], u0[CB], k[CB]; \
    for (i64 c = 0; c < w; c++) { t1[c] = 0; t0[c] = 0; k[c] = m ? m[n * C + c0 + c] : 0; } \
    for (i64 p0 = 0; p0 < P; p0 += PB) { \
      i64 p1 = p0 + PB < P ? p0 + PB : P; \
      for (i64 c = 0; c < w; c++) { u1[c] = 0; u0[c] = 0; } \
      for (i64 p = p0; p < p1; p++) { const T *gq = g + (n * P + p) * C + c0, *xq = x + (n * P + p) * C + c0; \
        _Pragma("omp simd") \
        for (i64 c = 0; c < w; c++) { A v = LD(gq[c]); u1[c] += v * (LD(xq[c]) - k[c]); u0[c] += v; } } \
      for (i64 c = 0; c < w; c++) { t1[c] += u1[c]; t0[c] += u0[c]; } \
    } \
    for (i64 c = 0; c < w; c++) { \
      s1[n * C + c0 + c] = (A)(t1[c] + k[c] * t0[c]); s0[n * C + c0 + c] = (A)t0[c]; } \
  } \
} \
void combine_cols_##NAME(const T *g, const T *x, const A *scale, i64 sn, i64 sc, const A *a, i64 an, i64 ac, double ca, \
                         const A *b, i64 bn, i64 bc, double cb, const A *m, T *dx, i64 N, i64 C, i64 P, int threads) { \
  i64 parts = (P + PB - 1) / PB, tasks = N * parts; \
  _Pragma("omp parallel for schedule(static) num_threads(threads)") \
  for (i64 t = 0; t < tasks; t++) { \
    i64 n = t / parts, p0 = (t % parts) * PB, p1 = p0 + PB < P ? p0 + PB : P; A s[CB], aq[CB], bq[CB]; \
    for (i64 c0 = 0; c0 < C; c0 += CB) { \
      i64 w = C - c0 < CB ? C - c0 : CB; const A *mq = m + n * C + c0; \
      for (i64 c = 0; c < w; c++) { \
        i64 k = c0 + c; s[c] = scale[n * sn + k * sc]; \
        aq[c] = a ? (A)(ca * a[n * an + k * ac]) : 0; bq[c] = b ? (A)(cb * b[n * bn + k * bc]) : 0; } \
      for (i64 p = p0; p < p1; p++) { \
        const T *gq = g + (n * P + p) * C + c0, *xq = x + (n * P + p) * C + c0; T *o = dx + (n * P + p) * C + c0; \
        _Pragma("omp simd") \
        for (i64 c = 0; c < w; c++) o[c] = ST(s[c] * LD(gq[c]) + aq[c] + bq[c] * (LD(xq[c]) - mq[c])); } \
    } \
  } \
}

#define TABLES(NAME, A) \
void pool_##NAME(const A *mean, const A *var, A *m, A *v, i64 N, i64 C) { \
  for (i64 c0 = 0; c0 < C; c0 += CB) { \
    i64 w = C - c0 < CB ? C - c0 : CB; double t[CB], u[CB]; \
    for (i64 c = 0; c < w; c++) { t[c] = 0; u[c] = 0; } \
    for (i64 n = 0; n < N; n++) for (i64 c = 0; c < w; c++) { \
      t[c] += mean[n * C + c0 + c]; u[c] += var[n * C + c0 + c]; } \
    for (i64 c = 0; c < w; c++) t[c] /= (double)N; \
    for (i64 n = 0; n < N; n++) for (i64 c = 0; c < w; c++) { \
      double d = mean[n * C + c0 + c] - t[c]; u[c] += d * d; } \
    for (i64 c = 0; c < w; c++) { m[c0 + c] = (A)t[c]; v[c0 + c] = (A)(u[c] / (double)N); } \
  } \
} \
void unpool_##NAME(const A *dm, const A *dv, const A *mean, const A *m, A *dmean, i64 N, i64 C) { \
  const A inverse = (A)1 / (A)N; \
  for (i64 n = 0; n < N; n++) for (i64 c = 0; c < C; c++) \
    dmean[n * C + c] = inverse * ((dm ? dm[c] : 0) + (dv ? 2 * dv[c] * (mean[n * C + c] - m[c]) : 0)); \
} \
void poolc_##NAME(const A *mean, const A *var, A *m, A *v, i64 N, i64 C) { \
  for (i64 n = 0; n < N; n++) { \
    const A *a = mean + n * C, *b = var + n * C; double t = 0, u = 0, e = 0; \
    _Pragma("omp simd reduction(+:t,u)") for (i64 c = 0; c < C; c++) { t += a[c]; u += b[c]; } \
    t /= (double)C; \
    _Pragma("omp simd reduction(+:e)") for (i64 c = 0; c < C; c++) { double d = a[c] - t; e += d * d; } \
    m[n] = (A)t; v[n] = (A)((u + e) / (double)C); \
  } \
} \
void unpoolc_##NAME(const A *dm, const A *dv, const A *mean, const A *m, A *dmean, i64 N, i64 C) { \
  const A inverse = (A)1 / (A)C; \
  for (i64 n = 0; n < N; n++) { \
    const A a = dm ? dm[n] : 0, b = dv ? 2 * dv[n] : 0, k = m[n]; \
    for (i64 c = 0; c < C; c++) dmean[n * C + c] = inverse * (a + b * (mean[n * C + c] - k)); \
  } \
} \
/* Statistics within a factor of the batch's deviation and (ratio - 1) deviations of its mean; returns how many moved. */ \
i64 guard_##NAME(const A *m, const A *v, const A *mean, const A *var, double eps, double ratio, A *gm, A *gv, i64 C) { \
  i64 acted = 0; const double square = ratio * ratio; \
  for (i64 c = 0; c < C; c++) { \
    gm[c] = mean[c]; gv[c] = var[c]; \
    if (!isfinite(m[c]) || !isfinite(v[c])) continue; \
    double floor_ = v[c] + eps, own = var[c] + eps, reach = sqrt(floor_) * (ratio - 1), k = mean[c]; \
    double w = own < floor_ / square ? floor_ / square : own > floor_ * square ? floor_ * square : own; \
    double q = k < m[c] - reach ? m[c] - reach : k > m[c] + reach ? m[c] + reach : k; \
    if (w != own || q != k) { acted++; gm[c] = (A)q; gv[c] = (A)(w - eps); } \
  } \
  return acted; \
} \
/* Exponentially weighted moments (C,) of the batches so far, the variance between them included. */ \
i64 follow_##NAME(const A *m, const A *v, A *mean, A *var, double rate, int first, i64 C) { \
  for (i64 c = 0; c < C; c++) if (!isfinite(m[c]) || !isfinite(v[c])) return 0; \
  for (i64 c = 0; c < C; c++) { \
    double gap = (double)m[c] - mean[c], between = first ? 0 : rate * (1 - rate) * gap * gap; \
    var[c] = (A)((1 - rate) * var[c] + rate * v[c] + between); mean[c] += (A)(rate * gap); \
  } \
  return 1; \
} \
void fold_##NAME(const A *s1, const A *s0, A *f1, A *f0, i64 N, i64 C) { \
  for (i64 c0 = 0; c0 < C; c0 += CB) { \
    i64 w = C - c0 < CB ? C - c0 : CB; double t[CB], u[CB]; \
    for (i64 c = 0; c < w; c++) { t[c] = 0; u[c] = 0; } \
    for (i64 n = 0; n < N; n++) for (i64 c = 0; c < w; c++) { \
      t[c] += s1[n * C + c0 + c]; u[c] += s0[n * C + c0 + c]; } \
    for (i64 c = 0; c < w; c++) { f1[c0 + c] = (A)t[c]; f0[c0 + c] = (A)u[c]; } \
  } \
} \
i64 track_##NAME(const A *m, const A *v, A *mean, A *var, double rate, double correction, i64 C) { \
  for (i64 c = 0; c < C; c++) if (!isfinite(m[c]) || !isfinite(v[c])) return 0; \
  for (i64 c = 0; c < C; c++) { \
    mean[c] += (A)(rate * ((double)m[c] - mean[c])); var[c] += (A)(rate * (correction * v[c] - (double)var[c])); \
  } \
  return 1; \
} \
/* t = var_n + (mean_n - m)^2, s_n = sum_c t / (v + eps) / D, q_n = (s_n + eps)^-1/2, gain = 1 - alpha + alpha q_n, \
 * scale = weight gain (v + eps)^-1/2, shift = bias - m scale. */ \
void unitize_##NAME(const A *mean, const A *var, const A *m, const A *v, const A *weight, const A *bias, const A *alpha, \
                    double eps, double D, A *scale, A *shift, A *q, i64 N, i64 C) { \
  for (i64 n = 0; n < N; n++) { \
    double s = 0; \
    for (i64 c0 = 0; c0 < C; c0 += CB) { \
      i64 c1 = c0 + CB < C ? c0 + CB : C; A part = 0; \
      _Pragma("omp simd reduction(+:part)") for (i64 c = c0; c < c1; c++) { \
        A d = mean[n * C + c] - m[c]; part += (var[n * C + c] + d * d) / (v[c] + (A)eps); } \
      s += part; \
    } \
    const A root = (A)(1.0 / sqrt(s / D + eps)); q[n] = root; \
    _Pragma("omp simd") for (i64 c = 0; c < C; c++) { \
      A k = (weight ? weight[c] : 1) * (1 - alpha[c] + alpha[c] * root) / (A)sqrt(v[c] + (A)eps); \
      scale[n * C + c] = k; shift[n * C + c] = (bias ? bias[c] : 0) - m[c] * k; } \
  } \
} \
/* The gradients of the inputs of unitize for those of scale (ds) and shift (dh). Accumulators (C,) start at zero. */ \
void deunitize_##NAME(const A *ds, const A *dh, const A *mean, const A *var, const A *m, const A *v, const A *weight, \
                      const A *alpha, const A *q, double eps, double D, A *dmean, A *dvar, double *dm, double *dv, \
                      double *dw, double *db, double *da, i64 N, i64 C) { \
  for (i64 c = 0; c < C; c++) { dm[c] = 0; dv[c] = 0; dw[c] = 0; db[c] = 0; da[c] = 0; } \
  for (i64 n = 0; n < N; n++) { \
    const A root = q[n]; double dq = 0; \
    for (i64 c0 = 0; c0 < C; c0 += CB) { \
      i64 c1 = c0 + CB < C ? c0 + CB : C; A part = 0; \
      _Pragma("omp simd reduction(+:part)") for (i64 c = c0; c < c1; c++) { \
        A inner = ds[n * C + c] - m[c] * dh[n * C + c]; \
        part += inner * alpha[c] * (weight ? weight[c] : 1) / (A)sqrt(v[c] + (A)eps); } \
      dq += part; \
    } \
    const A dS = (A)(-0.5 * dq * root * root * root / D); \
    _Pragma("omp simd") for (i64 c = 0; c < C; c++) { \
      A power = 1 / (v[c] + (A)eps), inverse = (A)sqrt(power), w = weight ? weight[c] : 1; \
      A gain = 1 - alpha[c] + alpha[c] * root, h = dh[n * C + c], inner = ds[n * C + c] - m[c] * h; \
      A d = mean[n * C + c] - m[c], dt = dS * power; \
      dvar[n * C + c] = dt; dmean[n * C + c] = 2 * dt * d; \
      dm[c] -= h * w * gain * inverse + 2 * dt * d; \
      dv[c] -= power * (dS * (var[n * C + c] + d * d) * power + (A)0.5 * inner * gain * w * inverse); \
      dw[c] += inner * gain * inverse; db[c] += h; da[c] += inner * w * inverse * (root - 1); } \
  } \
}

DEFINE(f32, float, float, join_f, LOAD_ID, STORE_ID)
DEFINE(f64, double, double, join_d, LOAD_ID, STORE_ID)
DEFINE(bf16, bf16, float, join_f, load_bf16, store_bf16)
#ifdef __FLT16_MAX__
DEFINE(f16, _Float16, float, join_f, LOAD_ID, STORE_ID)
#endif
TABLES(f32, float)
TABLES(f64, double)
