/* The four passes that every normalization shares, for an activation x seen as N samples, C channels, P positions,
 * and the tables between them.
 *
 *   moments   mean[n,c], var[n,c]            of x over the positions (two passes per slab that stays in cache)
 *   affine    y  = scale * x + shift
 *   sums      s1 = sum g * x, s0 = sum g     taken about a center m: s1 = sum g * (x - m) + m * s0
 *   combine   dx = scale * g + ca * a + cb * b * (x - m)
 *   pool      mean[c], var[c]                over the samples (or channels), by Chan's formula; and its backward
 *   add       sum over the samples           of two tables
 *   track     running statistics             of a pooled batch; a batch with a non-finite channel is left out
 *   follow    the same, exponentially weighted with the variance between batches
 *   guard     statistics                     kept within a factor of those of the batch
 *   standardize  scale, shift                of given statistics; and its backward
 *   population   follow, guard, standardize  one after the other
 *   unitize   scale, shift                   of unitized batch normalization; and its backward
 *
 * Two layouts: "rows" (N, C, P contiguous: one row of P values per table entry) and "cols" (N, P, C contiguous:
 * channels last). Tables are dense (N, C) in the accumulation type, except those that come with two strides, so that a
 * (1, C) or (N, 1) table needs no copy. Sums are taken in short blocks that are added in double, so that their error
 * does not grow with P. Plain C with OpenMP: compiles in a second or two, needs no headers of torch.
 */
#ifndef T

#define SELF "normalization.c"
#define AHEAD 768         /* values fetched before they are added: between rows the memory would wait */
#define CHANNEL_BLOCK 256 /* channels handled at once in the channels-last layout */
#define POSITION_BLOCK 64 /* positions summed at once in the channels-last layout */
#include "each_type.h"

#else

/* The passes over contiguous activations: a row of P values per entry of the tables. */

void NAME(moments_rows)(const T *x, A *mean, A *var, i64 N, i64 C, i64 P, int threads) {
  const i64 rows = N * C;
  const double inverse = 1.0 / (double)P;
  PARALLEL for (i64 r = 0; r < rows; r++) {
    const T *row = x + r * P;
    double total = 0, square = 0, rest = 0;
    for (i64 start = 0; start < P; start += BLOCK) {
      const i64 end = smaller(start + BLOCK, P);
      i64 p = start;
      A sum[LANES] = {0}, tail = 0;
      for (; p + LANES <= end; p += LANES) {
        __builtin_prefetch(row + p + AHEAD, 0, 3);
        __builtin_prefetch(row + p + AHEAD + LANES / 2, 0, 3);
        for (int l = 0; l < LANES; l++) sum[l] += LOAD(row[p + l]);
      }
      for (; p < end; p++) tail += LOAD(row[p]);
      total += JOIN(sum) + tail;
    }
    const A m = (A)(total * inverse);
    for (i64 start = 0; start < P; start += BLOCK) {
      const i64 end = smaller(start + BLOCK, P);
      i64 p = start;
      A squares[LANES] = {0}, sum[LANES] = {0}, square_tail = 0, tail = 0;
      for (; p + LANES <= end; p += LANES)
        for (int l = 0; l < LANES; l++) { A d = LOAD(row[p + l]) - m; squares[l] += d * d; sum[l] += d; }
      for (; p < end; p++) { A d = LOAD(row[p]) - m; square_tail += d * d; tail += d; }
      square += JOIN(squares) + square_tail;
      rest += JOIN(sum) + tail;
    }
    const double off = rest * inverse, v = square * inverse - off * off;
    mean[r] = (A)(m + off);
    var[r] = (A)(v < 0 ? 0 : v);
  }
}

void NAME(affine_rows)(const T *x, const A *scale, i64 scale_n, i64 scale_c, const A *shift, i64 shift_n, i64 shift_c,
                       T *y, i64 N, i64 C, i64 P, int threads) {
  const i64 rows = N * C;
  BACKWARDS(r, rows) {
    const i64 n = r / C, c = r % C;
    const A s = scale[n * scale_n + c * scale_c], h = shift ? shift[n * shift_n + c * shift_c] : 0;
    const T *row = x + r * P;
    T *out = y + r * P;
    SIMD for (i64 p = 0; p < P; p++) out[p] = STORE(s * LOAD(row[p]) + h);
  }
}

void NAME(sums_rows)(const T *g, const T *x, const A *center, A *s1, A *s0, i64 N, i64 C, i64 P, int threads) {
  const i64 rows = N * C;
  PARALLEL for (i64 r = 0; r < rows; r++) {
    const T *g_row = g + r * P, *x_row = x + r * P;
    const A m = center ? center[r] : 0;
    double first = 0, zeroth = 0;
    for (i64 start = 0; start < P; start += BLOCK) {
      const i64 end = smaller(start + BLOCK, P);
      i64 p = start;
      A products[LANES] = {0}, sum[LANES] = {0}, product_tail = 0, tail = 0;
      for (; p + LANES <= end; p += LANES)
        for (int l = 0; l < LANES; l++) {
          A v = LOAD(g_row[p + l]);
          products[l] += v * (LOAD(x_row[p + l]) - m);
          sum[l] += v;
        }
      for (; p < end; p++) { A v = LOAD(g_row[p]); product_tail += v * (LOAD(x_row[p]) - m); tail += v; }
      first += JOIN(products) + product_tail;
      zeroth += JOIN(sum) + tail;
    }
    s1[r] = (A)(first + m * zeroth);
    s0[r] = (A)zeroth;
  }
}

void NAME(combine_rows)(const T *g, const T *x, const A *scale, i64 scale_n, i64 scale_c, const A *a, i64 a_n, i64 a_c,
                        double a_factor, const A *b, i64 b_n, i64 b_c, double b_factor, const A *center, T *dx,
                        i64 N, i64 C, i64 P, int threads) {
  const i64 rows = N * C;
  BACKWARDS(r, rows) {
    const i64 n = r / C, c = r % C;
    const A s = scale[n * scale_n + c * scale_c], m = center[r];
    const A ar = a ? (A)(a_factor * a[n * a_n + c * a_c]) : 0, br = b ? (A)(b_factor * b[n * b_n + c * b_c]) : 0;
    const T *g_row = g + r * P, *x_row = x + r * P;
    T *out = dx + r * P;
    SIMD for (i64 p = 0; p < P; p++) out[p] = STORE(s * LOAD(g_row[p]) + ar + br * (LOAD(x_row[p]) - m));
  }
}

/* The passes over activations with channels last: a row of C values per position, blocks of channels in registers. */

#include "tile.h"

void NAME(moments_cols)(const T *x, A *mean, A *var, i64 N, i64 C, i64 P, int threads) {
  const i64 blocks = (C + CHANNELS - 1) / CHANNELS, tasks = N * blocks;
  PARALLEL for (i64 t = 0; t < tasks; t++) {
    const i64 n = t / blocks, c0 = (t % blocks) * CHANNELS, width = smaller(C - c0, CHANNELS), at = n * C + c0;
    double count = 0, m[CHANNELS] = {0}, square[CHANNELS] = {0};
    for (i64 p = 0; p < P; p += TILE)
      NAME(tile)(x + n * P * C + c0, NULL, NULL, p, smaller(p + TILE, P), C, width, &count, m, square);
    for (i64 c = 0; c < width; c++) { mean[at + c] = (A)m[c]; var[at + c] = NAME(variance)(square[c], count); }
  }
}

void NAME(affine_cols)(const T *x, const A *scale, i64 scale_n, i64 scale_c, const A *shift, i64 shift_n, i64 shift_c,
                       T *y, i64 N, i64 C, i64 P, int threads) {
  const i64 parts = (P + POSITION_BLOCK - 1) / POSITION_BLOCK, tasks = N * parts;
  BACKWARDS(t, tasks) {
    const i64 n = t / parts, start = (t % parts) * POSITION_BLOCK, end = smaller(start + POSITION_BLOCK, P);
    A s[CHANNEL_BLOCK], h[CHANNEL_BLOCK];
    for (i64 c0 = 0; c0 < C; c0 += CHANNEL_BLOCK) {
      const i64 width = smaller(C - c0, CHANNEL_BLOCK);
      for (i64 c = 0; c < width; c++) {
        s[c] = scale[n * scale_n + (c0 + c) * scale_c];
        h[c] = shift ? shift[n * shift_n + (c0 + c) * shift_c] : 0;
      }
      for (i64 p = start; p < end; p++) {
        const T *values = x + (n * P + p) * C + c0;
        T *out = y + (n * P + p) * C + c0;
        SIMD for (i64 c = 0; c < width; c++) out[c] = STORE(s[c] * LOAD(values[c]) + h[c]);
      }
    }
  }
}

void NAME(sums_cols)(const T *g, const T *x, const A *center, A *s1, A *s0, i64 N, i64 C, i64 P, int threads) {
  const i64 blocks = (C + CHANNEL_BLOCK - 1) / CHANNEL_BLOCK, tasks = N * blocks;
  PARALLEL for (i64 t = 0; t < tasks; t++) {
    const i64 n = t / blocks, c0 = (t % blocks) * CHANNEL_BLOCK, width = smaller(C - c0, CHANNEL_BLOCK);
    double first[CHANNEL_BLOCK], zeroth[CHANNEL_BLOCK];
    A products[CHANNEL_BLOCK], sum[CHANNEL_BLOCK], m[CHANNEL_BLOCK];
    for (i64 c = 0; c < width; c++) { first[c] = 0; zeroth[c] = 0; m[c] = center ? center[n * C + c0 + c] : 0; }
    for (i64 start = 0; start < P; start += POSITION_BLOCK) {
      const i64 end = smaller(start + POSITION_BLOCK, P);
      for (i64 c = 0; c < width; c++) { products[c] = 0; sum[c] = 0; }
      for (i64 p = start; p < end; p++) {
        const T *g_values = g + (n * P + p) * C + c0, *x_values = x + (n * P + p) * C + c0;
        SIMD for (i64 c = 0; c < width; c++) {
          A v = LOAD(g_values[c]);
          products[c] += v * (LOAD(x_values[c]) - m[c]);
          sum[c] += v;
        }
      }
      for (i64 c = 0; c < width; c++) { first[c] += products[c]; zeroth[c] += sum[c]; }
    }
    for (i64 c = 0; c < width; c++) {
      s1[n * C + c0 + c] = (A)(first[c] + m[c] * zeroth[c]);
      s0[n * C + c0 + c] = (A)zeroth[c];
    }
  }
}

void NAME(combine_cols)(const T *g, const T *x, const A *scale, i64 scale_n, i64 scale_c, const A *a, i64 a_n, i64 a_c,
                        double a_factor, const A *b, i64 b_n, i64 b_c, double b_factor, const A *center, T *dx,
                        i64 N, i64 C, i64 P, int threads) {
  const i64 parts = (P + POSITION_BLOCK - 1) / POSITION_BLOCK, tasks = N * parts;
  BACKWARDS(t, tasks) {
    const i64 n = t / parts, start = (t % parts) * POSITION_BLOCK, end = smaller(start + POSITION_BLOCK, P);
    A s[CHANNEL_BLOCK], ac[CHANNEL_BLOCK], bc[CHANNEL_BLOCK];
    for (i64 c0 = 0; c0 < C; c0 += CHANNEL_BLOCK) {
      const i64 width = smaller(C - c0, CHANNEL_BLOCK);
      const A *m = center + n * C + c0;
      for (i64 c = 0; c < width; c++) {
        const i64 k = c0 + c;
        s[c] = scale[n * scale_n + k * scale_c];
        ac[c] = a ? (A)(a_factor * a[n * a_n + k * a_c]) : 0;
        bc[c] = b ? (A)(b_factor * b[n * b_n + k * b_c]) : 0;
      }
      for (i64 p = start; p < end; p++) {
        const T *g_values = g + (n * P + p) * C + c0, *x_values = x + (n * P + p) * C + c0;
        T *out = dx + (n * P + p) * C + c0;
        SIMD for (i64 c = 0; c < width; c++)
          out[c] = STORE(s[c] * LOAD(g_values[c]) + ac[c] + bc[c] * (LOAD(x_values[c]) - m[c]));
      }
    }
  }
}

#ifdef WIDE

void NAME(pool_samples)(const A *mean, const A *var, A *pooled_mean, A *pooled_var, i64 N, i64 C) {
  for (i64 c0 = 0; c0 < C; c0 += CHANNEL_BLOCK) {
    const i64 width = smaller(C - c0, CHANNEL_BLOCK);
    double m[CHANNEL_BLOCK], v[CHANNEL_BLOCK];
    for (i64 c = 0; c < width; c++) { m[c] = 0; v[c] = 0; }
    for (i64 n = 0; n < N; n++)
      for (i64 c = 0; c < width; c++) { m[c] += mean[n * C + c0 + c]; v[c] += var[n * C + c0 + c]; }
    for (i64 c = 0; c < width; c++) m[c] /= (double)N;
    for (i64 n = 0; n < N; n++)
      for (i64 c = 0; c < width; c++) { double d = mean[n * C + c0 + c] - m[c]; v[c] += d * d; }
    for (i64 c = 0; c < width; c++) { pooled_mean[c0 + c] = (A)m[c]; pooled_var[c0 + c] = (A)(v[c] / (double)N); }
  }
}

/* The gradient of the means for those of the pooled moments; that of the variances is dv / N (or / C) everywhere. */
void NAME(unpool_samples)(const A *dm, const A *dv, const A *mean, const A *pooled_mean, A *dmean, i64 N, i64 C) {
  const A inverse = (A)1 / (A)N;
  for (i64 n = 0; n < N; n++)
    for (i64 c = 0; c < C; c++)
      dmean[n * C + c] =
          inverse * ((dm ? dm[c] : 0) + (dv ? 2 * dv[c] * (mean[n * C + c] - pooled_mean[c]) : 0));
}

void NAME(pool_channels)(const A *mean, const A *var, A *pooled_mean, A *pooled_var, i64 N, i64 C) {
  for (i64 n = 0; n < N; n++) {
    const A *means = mean + n * C, *vars = var + n * C;
    double m = 0, v = 0, between = 0;
    _Pragma("omp simd reduction(+:m,v)") for (i64 c = 0; c < C; c++) { m += means[c]; v += vars[c]; }
    m /= (double)C;
    _Pragma("omp simd reduction(+:between)") for (i64 c = 0; c < C; c++) { double d = means[c] - m; between += d * d; }
    pooled_mean[n] = (A)m;
    pooled_var[n] = (A)((v + between) / (double)C);
  }
}

void NAME(unpool_channels)(const A *dm, const A *dv, const A *mean, const A *pooled_mean, A *dmean, i64 N, i64 C) {
  const A inverse = (A)1 / (A)C;
  for (i64 n = 0; n < N; n++) {
    const A a = dm ? dm[n] : 0, b = dv ? 2 * dv[n] : 0, m = pooled_mean[n];
    for (i64 c = 0; c < C; c++) dmean[n * C + c] = inverse * (a + b * (mean[n * C + c] - m));
  }
}

void NAME(add_samples)(const A *s1, const A *s0, A *sum1, A *sum0, i64 N, i64 C) {
  for (i64 c0 = 0; c0 < C; c0 += CHANNEL_BLOCK) {
    const i64 width = smaller(C - c0, CHANNEL_BLOCK);
    double first[CHANNEL_BLOCK], zeroth[CHANNEL_BLOCK];
    for (i64 c = 0; c < width; c++) { first[c] = 0; zeroth[c] = 0; }
    for (i64 n = 0; n < N; n++)
      for (i64 c = 0; c < width; c++) { first[c] += s1[n * C + c0 + c]; zeroth[c] += s0[n * C + c0 + c]; }
    for (i64 c = 0; c < width; c++) { sum1[c0 + c] = (A)first[c]; sum0[c0 + c] = (A)zeroth[c]; }
  }
}

/* Statistics within a factor of the batch's deviation and (ratio - 1) deviations of its mean; returns how many moved. */
i64 NAME(guard)(const A *batch_mean, const A *batch_var, const A *mean, const A *var, double eps, double ratio,
                A *guarded_mean, A *guarded_var, i64 C) {
  i64 moved = 0;
  const double square = ratio * ratio;
  for (i64 c = 0; c < C; c++) {
    guarded_mean[c] = mean[c];
    guarded_var[c] = var[c];
    if (!isfinite(batch_mean[c]) || !isfinite(batch_var[c])) continue;
    const double batch = batch_var[c] + eps, own = var[c] + eps, reach = sqrt(batch) * (ratio - 1), m = mean[c];
    const double low = batch_mean[c] - reach, high = batch_mean[c] + reach;
    const double v = own < batch / square ? batch / square : own > batch * square ? batch * square : own;
    const double k = m < low ? low : m > high ? high : m;
    if (v != own || k != m) { moved++; guarded_mean[c] = (A)k; guarded_var[c] = (A)(v - eps); }
  }
  return moved;
}

/* Exponentially weighted moments (C,) of the batches so far, the variance between them included. */
i64 NAME(follow)(const A *batch_mean, const A *batch_var, A *mean, A *var, double rate, int first, i64 C) {
  for (i64 c = 0; c < C; c++) if (!isfinite(batch_mean[c]) || !isfinite(batch_var[c])) return 0;
  for (i64 c = 0; c < C; c++) {
    const double gap = (double)batch_mean[c] - mean[c], between = first ? 0 : rate * (1 - rate) * gap * gap;
    var[c] = (A)((1 - rate) * var[c] + rate * batch_var[c] + between);
    mean[c] += (A)(rate * gap);
  }
  return 1;
}

i64 NAME(track)(const A *batch_mean, const A *batch_var, A *mean, A *var, double rate, double correction, i64 C) {
  for (i64 c = 0; c < C; c++) if (!isfinite(batch_mean[c]) || !isfinite(batch_var[c])) return 0;
  for (i64 c = 0; c < C; c++) {
    mean[c] += (A)(rate * ((double)batch_mean[c] - mean[c]));
    var[c] += (A)(rate * (correction * batch_var[c] - (double)var[c]));
  }
  return 1;
}

/* scale = weight (var + eps)^-1/2, shift = bias - mean scale. */
void NAME(standardize)(const A *mean, const A *var, const A *weight, const A *bias, double eps, A *scale, A *shift,
                       i64 C) {
  for (i64 c = 0; c < C; c++) {
    scale[c] = (weight ? weight[c] : 1) / (A)sqrt(var[c] + (A)eps);
    shift[c] = (bias ? bias[c] : 0) - mean[c] * scale[c];
  }
}

/* All that population normalization does between its passes: the batch enters the statistics (`running`), which are
 * kept within a factor of it (`ratio`, 0 for none) and make scale and shift; the share that moved goes to `clipped`. */
void NAME(population)(const A *batch_mean, const A *batch_var, A *mean, A *var, i64 *batches, double momentum,
                      int running, double eps, double ratio, const A *weight, const A *bias, A *guarded_mean,
                      A *guarded_var, A *scale, A *shift, float *clipped, i64 C) {
  if (running) {
    const i64 seen = *batches + 1;
    const double rate = seen == 1 || momentum < 0 ? 1.0 / (double)seen
                                                  : momentum / (1 - pow(1 - momentum, (double)seen) + 1e-30);
    *batches += NAME(follow)(batch_mean, batch_var, mean, var, rate, seen == 1, C);
  }
  if (ratio) {
    const i64 moved = NAME(guard)(batch_mean, batch_var, mean, var, eps, ratio, guarded_mean, guarded_var, C);
    *clipped = (float)moved / (float)(C > 0 ? C : 1);
  } else {
    memcpy(guarded_mean, mean, C * sizeof(A));
    memcpy(guarded_var, var, C * sizeof(A));
  }
  NAME(standardize)(guarded_mean, guarded_var, weight, bias, eps, scale, shift, C);
}

/* The gradients for those of scale (ds) and shift (dh), of the moments (m, v) of the batch that the statistics (mean,
 * var) follow, and of the weight: d scale / d v = -scale / (2 (v + eps)), d shift / d m = -scale, the rest constant. */
void NAME(standardize_backward)(const A *ds, const A *dh, const A *m, const A *v, const A *mean, const A *var,
                                const A *weight, double eps, A *dm, A *dv, A *dweight, i64 C) {
  for (i64 c = 0; c < C; c++) {
    const A inverse = 1 / (A)sqrt(var[c] + (A)eps), gain = (weight ? weight[c] : 1) * inverse;
    dm[c] = -gain * dh[c];
    dv[c] = (A)-0.5 * gain * (ds[c] - m[c] * dh[c]) / (v[c] + (A)eps);
    dweight[c] = inverse * (ds[c] - mean[c] * dh[c]);
  }
}

/* t = var_n + (mean_n - m)^2, s_n = sum_c t / (v + eps) / divisor, q_n = (s_n + eps)^-1/2,
 * gain = 1 - alpha + alpha q_n, scale = weight gain (v + eps)^-1/2, shift = bias - m scale. */
void NAME(unitize)(const A *mean, const A *var, const A *m, const A *v, const A *weight, const A *bias, const A *alpha,
                   double eps, double divisor, A *scale, A *shift, A *q, i64 N, i64 C) {
  for (i64 n = 0; n < N; n++) {
    double s = 0;
    for (i64 c0 = 0; c0 < C; c0 += CHANNEL_BLOCK) {
      const i64 c1 = smaller(c0 + CHANNEL_BLOCK, C);
      A part = 0;
      _Pragma("omp simd reduction(+:part)") for (i64 c = c0; c < c1; c++) {
        A d = mean[n * C + c] - m[c];
        part += (var[n * C + c] + d * d) / (v[c] + (A)eps);
      }
      s += part;
    }
    const A root = (A)(1.0 / sqrt(s / divisor + eps));
    q[n] = root;
    SIMD for (i64 c = 0; c < C; c++) {
      A k = (weight ? weight[c] : 1) * (1 - alpha[c] + alpha[c] * root) / (A)sqrt(v[c] + (A)eps);
      scale[n * C + c] = k;
      shift[n * C + c] = (bias ? bias[c] : 0) - m[c] * k;
    }
  }
}

/* The gradients of the inputs of unitize for those of scale (ds) and shift (dh). */
void NAME(unitize_backward)(const A *ds, const A *dh, const A *mean, const A *var, const A *m, const A *v,
                            const A *weight, const A *alpha, const A *q, double eps, double divisor, A *dmean, A *dvar,
                            double *dm, double *dv, double *dweight, double *dbias, double *dalpha, i64 N, i64 C) {
  for (i64 c = 0; c < C; c++) { dm[c] = 0; dv[c] = 0; dweight[c] = 0; dbias[c] = 0; dalpha[c] = 0; }
  for (i64 n = 0; n < N; n++) {
    const A root = q[n];
    double dq = 0;
    for (i64 c0 = 0; c0 < C; c0 += CHANNEL_BLOCK) {
      const i64 c1 = smaller(c0 + CHANNEL_BLOCK, C);
      A part = 0;
      _Pragma("omp simd reduction(+:part)") for (i64 c = c0; c < c1; c++) {
        A inner = ds[n * C + c] - m[c] * dh[n * C + c];
        part += inner * alpha[c] * (weight ? weight[c] : 1) / (A)sqrt(v[c] + (A)eps);
      }
      dq += part;
    }
    const A dS = (A)(-0.5 * dq * root * root * root / divisor);
    SIMD for (i64 c = 0; c < C; c++) {
      A power = 1 / (v[c] + (A)eps), inverse = (A)sqrt(power), w = weight ? weight[c] : 1;
      A gain = 1 - alpha[c] + alpha[c] * root, h = dh[n * C + c], inner = ds[n * C + c] - m[c] * h;
      A d = mean[n * C + c] - m[c], dt = dS * power;
      dvar[n * C + c] = dt;
      dmean[n * C + c] = 2 * dt * d;
      dm[c] -= h * w * gain * inverse + 2 * dt * d;
      dv[c] -= power * (dS * (var[n * C + c] + d * d) * power + (A)0.5 * inner * gain * w * inverse);
      dweight[c] += inner * gain * inverse;
      dbias[c] += h;
      dalpha[c] += inner * w * inverse * (root - 1);
    }
  }
}

#endif
#endif
