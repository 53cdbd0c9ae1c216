/* The passes over samples whose positions do not all count, or are not equally many: masks, and graphs of a batch.
 *
 * "rows": (N, C, P) contiguous, with weights (N, P) of the positions. "cols": rows of C channels, of which sample n has
 * P, or those from starts[n] to starts[n + 1]: of the list `order`, or as they lie where there is none; with weights,
 * one for each row. What weighs nothing is not read for moments and their gradients.
 *
 *   moments   mean[n,c], var[n,c], count[n]   count is the sum of the weights; zeros where that is zero
 *   affine    y  = scale * x + shift
 *   sums      s1 = sum g * x, s0 = sum g      over all positions of a sample, taken about a center
 *   combine   dx = scale * g + weight / count * (dmean + 2 * dvar * (x - mean))
 *
 * Every argument is a word of eight bytes; a call takes one address, that of all of them.
 */
#ifndef T

#define SELF "ragged.c"
#include <stdint.h>

typedef int64_t i64;
typedef struct { const i64 *starts, *order; i64 N, C, P, threads; } Spans;

static inline i64 first_of(const Spans *s, i64 n) { return s->starts ? s->starts[n] : n * s->P; }
static inline i64 row_at(const Spans *s, i64 i) { return s->order ? s->order[i] : i; }

/* The sample of the i-th row: the last that begins there or before. */
static inline i64 sample_of(const Spans *s, i64 i) {
  if (!s->starts) return i / s->P;
  i64 low = 0, high = s->N;
  while (high - low > 1) { const i64 middle = (low + high) / 2; if (s->starts[middle] <= i) low = middle; else high = middle; }
  return low;
}

#include "each_type.h"

#else

#include "tile.h"

typedef struct { const A *table; i64 n, c; } NAME(Table); /* with its strides */
typedef struct { Spans spans; const A *weights; const T *x; A *mean, *var, *count; } NAME(Moments);

void NAME(moments_cols)(const NAME(Moments) *call) {
  const Spans *spans = &call->spans;
  const i64 C = spans->C, blocks = (C + CHANNELS - 1) / CHANNELS;
  const int threads = (int)spans->threads;
  PARALLEL for (i64 task = 0; task < spans->N * blocks; task++) {
    const i64 sample = task / blocks, c0 = (task % blocks) * CHANNELS, width = smaller(C - c0, CHANNELS);
    const i64 begin = first_of(spans, sample), end = first_of(spans, sample + 1);
    double count = 0, mean[CHANNELS] = {0}, square[CHANNELS] = {0};
    for (i64 i = begin; i < end; i += TILE)
      NAME(tile)(call->x + c0, call->weights, spans->order, i, smaller(i + TILE, end), C, width, &count, mean, square);
    for (i64 c = 0; c < width; c++) {
      call->mean[sample * C + c0 + c] = (A)mean[c];
      call->var[sample * C + c0 + c] = NAME(variance)(square[c], count);
    }
    if (c0 == 0) call->count[sample] = (A)count;
  }
}

void NAME(moments_rows)(const NAME(Moments) *call) {
  const i64 C = call->spans.C, P = call->spans.P;
  const int threads = (int)call->spans.threads;
  PARALLEL for (i64 task = 0; task < call->spans.N * C; task++) {
    const T *x = call->x + task * P;
    const A *weights = call->weights + task / C * P;
    double n = 0, total = 0, rest = 0, square = 0;
    for (i64 p0 = 0; p0 < P; p0 += BLOCK) {
      A sum = 0, count = 0;
      ADDING(sum, count) for (i64 p = p0; p < smaller(p0 + BLOCK, P); p++) {
        count += weights[p];
        sum += weights[p] > 0 ? weights[p] * LOAD(x[p]) : 0;
      }
      total += sum, n += count;
    }
    const A m = (A)(n > 0 ? total / n : 0);
    for (i64 p0 = 0; p0 < P; p0 += BLOCK) {
      A sum = 0, off = 0;
      ADDING(sum, off) for (i64 p = p0; p < smaller(p0 + BLOCK, P); p++) {
        const A d = weights[p] > 0 ? LOAD(x[p]) - m : 0;
        off += weights[p] * d;
        sum += weights[p] * d * d;
      }
      square += sum, rest += off;
    }
    const double off = n > 0 ? rest / n : 0, v = n > 0 ? square / n - off * off : 0;
    call->mean[task] = (A)(m + off);
    call->var[task] = (A)(v < 0 ? 0 : v);
    if (task % C == 0) call->count[task / C] = (A)n;
  }
}

typedef struct { Spans spans; const T *x; T *y; NAME(Table) scale, shift; } NAME(Affine);

void NAME(affine_cols)(const NAME(Affine) *call) {
  const Spans *spans = &call->spans;
  const NAME(Table) s = call->scale, h = call->shift;
  const i64 C = spans->C, rows = first_of(spans, spans->N);
  const int threads = (int)spans->threads;
  PARALLEL for (i64 start = 0; start < rows; start += TILE) {
    A scale[CHANNELS], shift[CHANNELS];
    for (i64 i = start, n = sample_of(spans, start); i < smaller(start + TILE, rows); n++) {
      const i64 stop = smaller(smaller(start + TILE, rows), first_of(spans, n + 1));
      if (stop <= i) continue;
      for (i64 c0 = 0; c0 < C; c0 += CHANNELS) {
        const i64 width = smaller(C - c0, CHANNELS);
        for (i64 c = 0; c < width; c++) {
          scale[c] = s.table[n * s.n + (c0 + c) * s.c];
          shift[c] = h.table ? h.table[n * h.n + (c0 + c) * h.c] : 0;
        }
        for (i64 k = i; k < stop; k++) {
          const i64 at = row_at(spans, k) * C + c0;
          SIMD for (i64 c = 0; c < width; c++) call->y[at + c] = STORE(scale[c] * LOAD(call->x[at + c]) + shift[c]);
        }
      }
      i = stop;
    }
  }
}

typedef struct { Spans spans; const T *x, *g; const A *center; A *s1, *s0; } NAME(Sums);

void NAME(sums_cols)(const NAME(Sums) *call) {
  const Spans *spans = &call->spans;
  const i64 C = spans->C, blocks = (C + CHANNELS - 1) / CHANNELS;
  const int threads = (int)spans->threads;
  PARALLEL for (i64 task = 0; task < spans->N * blocks; task++) {
    const i64 n = task / blocks, c0 = (task % blocks) * CHANNELS, width = smaller(C - c0, CHANNELS), at = n * C + c0;
    const i64 begin = first_of(spans, n), end = first_of(spans, n + 1);
    double first[CHANNELS] = {0}, zeroth[CHANNELS] = {0};
    A m[CHANNELS];
    for (i64 c = 0; c < width; c++) m[c] = call->center ? call->center[at + c] : 0;
    for (i64 start = begin; start < end; start += TILE) {
      A products[CHANNELS] = {0}, sum[CHANNELS] = {0};
      for (i64 i = start; i < smaller(start + TILE, end); i++) {
        const T *g = call->g + row_at(spans, i) * C + c0, *x = call->x + row_at(spans, i) * C + c0;
        SIMD for (i64 c = 0; c < width; c++) { const A v = LOAD(g[c]); products[c] += v * (LOAD(x[c]) - m[c]); sum[c] += v; }
      }
      for (i64 c = 0; c < width; c++) first[c] += products[c], zeroth[c] += sum[c];
    }
    for (i64 c = 0; c < width; c++) call->s1[at + c] = (A)(first[c] + m[c] * zeroth[c]), call->s0[at + c] = (A)zeroth[c];
  }
}

typedef struct {
  Spans spans; const A *weights; const T *x, *g; T *dx; NAME(Table) scale, dmean, dvar; const A *mean, *count;
} NAME(Combine);

/* Scale, the gradient of the mean and twice that of the variance over the count, and the mean, for a sample and channel. */
ALWAYS void NAME(tables_at)(const NAME(Combine) *call, i64 n, i64 c, A *scale, A *a, A *b, A *m) {
  const A count = call->count[n], share = count > 0 ? 1 / count : 0;
  *scale = call->scale.table ? call->scale.table[n * call->scale.n + c * call->scale.c] : 1;
  *a = call->dmean.table ? share * call->dmean.table[n * call->dmean.n + c * call->dmean.c] : 0;
  *b = call->dvar.table ? 2 * share * call->dvar.table[n * call->dvar.n + c * call->dvar.c] : 0;
  *m = call->mean[n * call->spans.C + c];
}

void NAME(combine_cols)(const NAME(Combine) *call) {
  const Spans *spans = &call->spans;
  const i64 C = spans->C, rows = first_of(spans, spans->N);
  const int threads = (int)spans->threads;
  PARALLEL for (i64 start = 0; start < rows; start += TILE) {
    A scale[CHANNELS], a[CHANNELS], b[CHANNELS], m[CHANNELS];
    for (i64 i = start, n = sample_of(spans, start); i < smaller(start + TILE, rows); n++) {
      const i64 stop = smaller(smaller(start + TILE, rows), first_of(spans, n + 1));
      if (stop <= i) continue;
      for (i64 c0 = 0; c0 < C; c0 += CHANNELS) {
        const i64 width = smaller(C - c0, CHANNELS);
        for (i64 c = 0; c < width; c++) NAME(tables_at)(call, n, c0 + c, scale + c, a + c, b + c, m + c);
        for (i64 k = i; k < stop; k++) {
          const i64 r = row_at(spans, k), at = r * C + c0;
          const A w = call->weights ? call->weights[r] : 1;
          const T *g = call->g + at, *x = call->x + at;
          T *dx = call->dx + at;
          if (w == 0) { SIMD for (i64 c = 0; c < width; c++) dx[c] = STORE(scale[c] * LOAD(g[c])); }
          else SIMD for (i64 c = 0; c < width; c++)
            dx[c] = STORE(scale[c] * LOAD(g[c]) + w * (a[c] + b[c] * (LOAD(x[c]) - m[c])));
        }
      }
      i = stop;
    }
  }
}

void NAME(combine_rows)(const NAME(Combine) *call) {
  const i64 C = call->spans.C, P = call->spans.P;
  const int threads = (int)call->spans.threads;
  PARALLEL for (i64 task = 0; task < call->spans.N * C; task++) {
    const A *w = call->weights + task / C * P;
    const T *g = call->g + task * P, *x = call->x + task * P;
    T *dx = call->dx + task * P;
    A scale, a, b, m;
    NAME(tables_at)(call, task / C, task % C, &scale, &a, &b, &m);
    SIMD for (i64 p = 0; p < P; p++)
      dx[p] = STORE(scale * LOAD(g[p]) + (w[p] > 0 ? w[p] * (a + b * (LOAD(x[p]) - m)) : 0));
  }
}

#endif
