/* For the C files that take moments of rows of channels: included by them once for every type. */

/* Moments merge by the formula of Chan, Golub & LeVeque (1979), as sums of weights, means and sums of squared
 * deviations. */
ALWAYS void NAME(merge)(double *count, double *mean, double *square, const double n, const double *m, const double *s,
                        i64 width) {
  const double total = *count + n, share = n / total, factor = share * *count;
  for (i64 c = 0; c < width; c++) {
    const double gap = m[c] - mean[c];
    mean[c] += share * gap;
    square[c] += s[c] + factor * gap * gap;
  }
  *count = total;
}

/* Moments of at most TILE rows and CHANNELS channels, which stay in the fastest cache, merged into the sum of weights,
 * the means and the sums of squared deviations of those before, by Chan's formula. The i-th row is row i of x, or
 * order[i]; one that weighs nothing is not read. */
ALWAYS void NAME(tile)(const T *x, const A *weights, const i64 *order, i64 begin, i64 end, i64 C, i64 width, double *count,
                       double *mean, double *square) {
  A center[CHANNELS], sum[CHANNELS] = {0}, rest[CHANNELS] = {0};
  double n = (double)(end - begin), m[CHANNELS], s[CHANNELS];
  const T *first = x + begin * C;
  if (weights || order) {
    n = 0;
    for (i64 i = begin; i < end; i++) {
      const i64 r = order ? order[i] : i;
      const A w = weights ? weights[r] : 1;
      if (w == 0) continue;
      n += w;
      SIMD for (i64 c = 0; c < width; c++) sum[c] += w * LOAD(x[r * C + c]);
    }
    if (n == 0) return;
  } else {
#define ADD(i, rows) \
  SIMD for (i64 c = 0; c < width; c++) { A u = 0; for (int k = 0; k < rows; k++) u += LOAD(first[(i + k) * C + c]); sum[c] += u; }
    BY_FOUR(i, end - begin, ADD)
#undef ADD
  }
  for (i64 c = 0; c < width; c++) center[c] = (A)(sum[c] / n), sum[c] = 0;
  if (weights || order) {
    for (i64 i = begin; i < end; i++) {
      const i64 r = order ? order[i] : i;
      const A w = weights ? weights[r] : 1;
      if (w == 0) continue;
      SIMD for (i64 c = 0; c < width; c++) { const A d = LOAD(x[r * C + c]) - center[c]; sum[c] += w * d * d; rest[c] += w * d; }
    }
  } else {
#define ADD(i, rows) \
  SIMD for (i64 c = 0; c < width; c++) { \
    A u = 0, v = 0; \
    for (int k = 0; k < rows; k++) { const A d = LOAD(first[(i + k) * C + c]) - center[c]; u += d * d; v += d; } \
    sum[c] += u; rest[c] += v; \
  }
    BY_FOUR(i, end - begin, ADD)
#undef ADD
  }
  for (i64 c = 0; c < width; c++) {
    const double off = rest[c] / n;
    m[c] = center[c] + off;
    s[c] = sum[c] - off * off * n;
  }
  NAME(merge)(count, mean, square, n, m, s, width);
}

ALWAYS A NAME(variance)(double square, double count) { return (A)(count == 0 || square < 0 ? 0 : square / count); }
