/* The passes over tokens, R of them with C channels each, whose tables are sums of at most two outer products: one
 * number for each token (and each of `groups` groups of its neighbouring channels) times one for each channel.
 *
 *   row_moments     mean[r,g], var[r,g]   of each token over the channels of a group
 *   column_moments  mean[c], var[c]       of each channel over the tokens, weighted or not
 *   affine          y  = scale * x + shift
 *   sums            the gradients of the factors of scale and shift for that of y
 *   combine         dx = scale * g + those through moments of the token and of the batch
 *
 * Two orders: "cols", (R, C) contiguous, and "rows", (N, C, P) contiguous with R = N * P. Every argument is a word of
 * eight bytes; a call takes one address, that of all of them. Sums are taken in short blocks that are added in double.
 * What is summed over tokens is cut by its shape alone, so that results do not depend on the number of threads.
 */
#ifndef T

#include <stdint.h>

#define SELF "tokens.c"
#define CHUNK 128    /* tokens summed at once */
#define TILES 8      /* of tokens in a row, by one thread */
#define POSITIONS 512 /* most tokens at once in "rows" order */

typedef struct { const void *row; int64_t groups; const void *column; } Term; /* without either, there is none */

#ifdef __AVX512F__
#pragma GCC target("prefer-vector-width=512")
#endif
#include "each_type.h"

#else

#include "tile.h"

/* The sum of two terms on a span of channels: k0[c] * a[0] + k1[c] * a[1] + constant, with as many k as `columns`. */
typedef struct { const A *k[2]; A a[2], constant; } NAME(Sum);

/* The terms with a factor along the span first, which is the column, or the row in "rows" order; how many those are. */
static int NAME(sorted)(const Term *terms, int rows, Term *found) {
  int along = 0, n = 0;
  for (int t = 0; t < 2; t++) if (rows ? terms[t].row : terms[t].column) found[n++] = terms[t], along++;
  for (int t = 0; t < 2; t++) if (rows ? !terms[t].row && terms[t].column : !terms[t].column && terms[t].row) found[n++] = terms[t];
  for (; n < 2; n++) found[n] = (Term){0};
  return along;
}

static i64 NAME(common)(i64 a, i64 b) { while (b) { i64 rest = a % b; a = b; b = rest; } return a; }

/* The longest span of channels on which every row factor is one number. */
static i64 NAME(span_of)(const Term *terms, int n, i64 C) {
  i64 width = C;
  for (int t = 0; t < n; t++) if (terms[t].row) width = NAME(common)(width, C / terms[t].groups);
  return width;
}

ALWAYS A NAME(of_row)(const void *row, i64 groups, i64 r, i64 c, i64 C) {
  return ((const A *)row)[groups == 1 ? r : r * groups + c / (C / groups)];
}

ALWAYS void NAME(at)(NAME(Sum) *sum, const Term *terms, int columns, i64 r, i64 c, i64 C) {
  for (int t = 0; t < 2; t++) {
    const A a = terms[t].row ? NAME(of_row)(terms[t].row, terms[t].groups, r, c, C) : t < columns;
    if (t < columns) sum->k[t] = (const A *)terms[t].column + c, sum->a[t] = a;
    else sum->constant += a;
  }
}

ALWAYS A NAME(sum_at)(const NAME(Sum) *sum, int columns, i64 c) {
  A v = sum->constant;
  if (columns > 0) v += sum->a[0] * sum->k[0][c];
  if (columns > 1) v += sum->a[1] * sum->k[1][c];
  return v;
}

typedef struct { const T *x; A *mean, *var; i64 N, C, P, threads; const A *weights; } NAME(Columns);

void NAME(column_moments_cols)(const NAME(Columns) *call) {
  const i64 R = call->N * call->P, C = call->C, length = TILE * TILES;
  const i64 chunks = (R + length - 1) / length, blocks = (C + CHANNELS - 1) / CHANNELS;
  const int threads = (int)call->threads;
  double *means = calloc(chunks * (2 * C + blocks), sizeof(double)), *squares = means + chunks * C;
  double *counts = squares + chunks * C;
  PARALLEL for (i64 task = 0; task < chunks * blocks; task++) {
    const i64 chunk = task / blocks, c = (task % blocks) * CHANNELS, width = smaller(C - c, CHANNELS);
    for (i64 r = chunk * length; r < smaller(R, (chunk + 1) * length); r += TILE) {
      const i64 at = chunk * C + c, end = smaller(r + TILE, R);
      if (call->weights) NAME(tile)(call->x + c, call->weights, NULL, r, end, C, width, counts + task, means + at, squares + at);
      else NAME(tile)(call->x + c, NULL, NULL, r, end, C, width, counts + task, means + at, squares + at);
    }
  }
  for (i64 b = 0; b < blocks; b++) {
    const i64 c0 = b * CHANNELS, width = smaller(C - c0, CHANNELS);
    for (i64 k = 1; k < chunks; k++)
      if (counts[k * blocks + b] > 0)
        NAME(merge)(counts + b, means + c0, squares + c0, counts[k * blocks + b], means + k * C + c0, squares + k * C + c0,
                    width);
    const double n = counts[b];
    for (i64 c = c0; c < c0 + width; c++) {
      call->mean[c] = (A)means[c];
      call->var[c] = NAME(variance)(squares[c], n);
    }
  }
  free(means);
}

typedef struct { const T *x; T *y; i64 N, C, P, threads; Term scale[2], shift[2]; } NAME(Affine);

ALWAYS void NAME(affine_span)(const T *x, T *y, NAME(Sum) s, NAME(Sum) h, int ns, int nh, i64 width) {
  SIMD for (i64 c = 0; c < width; c++) y[c] = STORE(NAME(sum_at)(&s, ns, c) * LOAD(x[c]) + NAME(sum_at)(&h, nh, c));
}

static void NAME(affine_of)(const T *x, T *y, NAME(Sum) s, NAME(Sum) h, int ns, int nh, i64 width) {
#define CASE(a, b) case 3 * a + b: NAME(affine_span)(x, y, s, h, a, b, width); break;
  switch (3 * ns + nh) { CASE(0, 0) CASE(0, 1) CASE(0, 2) CASE(1, 0) CASE(1, 1) CASE(1, 2) CASE(2, 0) CASE(2, 1) CASE(2, 2) }
#undef CASE
}

void NAME(affine_cols)(const NAME(Affine) *call) {
  const i64 R = call->N * call->P, C = call->C;
  const int threads = (int)call->threads;
  Term terms[4];
  const int ns = NAME(sorted)(call->scale, 0, terms), nh = NAME(sorted)(call->shift, 0, terms + 2);
  const i64 width = NAME(span_of)(terms, 4, C);
  BACKWARDS(r, R)
    for (i64 c = 0; c < C; c += width) {
      NAME(Sum) s = {0}, h = {0};
      NAME(at)(&s, terms, ns, r, c, C);
      NAME(at)(&h, terms + 2, nh, r, c, C);
      NAME(affine_of)(call->x + r * C + c, call->y + r * C + c, s, h, ns, nh, width);
    }
}

typedef struct { const A *mean, *dmean, *dvar, *weights; i64 groups; double size; } NAME(Source); /* none: no mean */
typedef struct { const T *x, *g; T *dx; i64 N, C, P, threads, one; Term scale[2]; NAME(Source) rows, columns; } NAME(Combine);

typedef struct { A p, q, m, w; const A *P, *Q, *M, *W; } NAME(Through);

/* Moments that are one number on the span, one for each of its entries, or both; weights of the entries, for the first. */
ALWAYS void NAME(combine_span)(const T *g, const T *x, T *dx, NAME(Sum) s, NAME(Through) t, int ns, int one, int each,
                               i64 width) {
  SIMD for (i64 c = 0; c < width; c++) {
    A d = NAME(sum_at)(&s, ns, c) * LOAD(g[c]);
    if (one == 1) d += t.p + t.q * (LOAD(x[c]) - t.m);
    if (one == 2) d += t.W[c] > 0 ? t.W[c] * (t.p + t.q * (LOAD(x[c]) - t.m)) : 0;
    if (each) d += t.w * (t.P[c] + t.Q[c] * (LOAD(x[c]) - t.M[c]));
    dx[c] = STORE(d);
  }
}

static void NAME(combine_of)(const T *g, const T *x, T *dx, NAME(Sum) s, NAME(Through) t, int ns, int one, int each, i64 width) {
#define CASE(a, b) \
  case 6 * a + 2 * b: NAME(combine_span)(g, x, dx, s, t, a, b, 0, width); break; \
  case 6 * a + 2 * b + 1: NAME(combine_span)(g, x, dx, s, t, a, b, 1, width); break;
  switch (6 * ns + 2 * one + each) {
    CASE(0, 0) CASE(0, 1) CASE(0, 2) CASE(1, 0) CASE(1, 1) CASE(1, 2) CASE(2, 0) CASE(2, 1) CASE(2, 2)
  }
#undef CASE
}

void NAME(combine_cols)(const NAME(Combine) *call) {
  const i64 R = call->N * call->P, C = call->C;
  const int threads = (int)call->threads;
  const A *weights = call->columns.weights;
  Term terms[3] = {{0}};
  const int ns = NAME(sorted)(call->scale, 0, terms), rows = call->rows.mean != NULL, columns = call->columns.mean != NULL;
  if (rows) terms[2] = (Term){call->rows.mean, call->rows.groups, NULL};
  const i64 width = NAME(span_of)(terms, 3, C), groups = call->rows.groups;
  const A row_factor = (A)(1 / call->rows.size), column_factor = (A)(1 / call->columns.size);
  A *P = NULL;
  if (columns) {
    P = malloc(2 * C * sizeof(A));
    for (i64 c = 0; c < C; c++) {
      P[c] = call->columns.dmean ? call->columns.dmean[c] * column_factor : 0;
      P[C + c] = call->columns.dvar ? 2 * call->columns.dvar[c] * column_factor : 0;
    }
  }
  BACKWARDS(r, R)
    for (i64 c = 0; c < C; c += width) {
      NAME(Sum) s = {.constant = (A)call->one};
      NAME(at)(&s, terms, ns, r, c, C);
      NAME(Through) t = {0};
      if (rows) {
        t.m = NAME(of_row)(call->rows.mean, groups, r, c, C);
        t.p = call->rows.dmean ? NAME(of_row)(call->rows.dmean, groups, r, c, C) * row_factor : 0;
        t.q = call->rows.dvar ? 2 * NAME(of_row)(call->rows.dvar, groups, r, c, C) * row_factor : 0;
      }
      if (columns) t.P = P + c, t.Q = P + C + c, t.M = call->columns.mean + c, t.w = weights ? weights[r] : 1;
      const T *g = call->g + r * C + c, *x = call->x + r * C + c;
      T *dx = call->dx + r * C + c;
NAME(combine_of)(g, x, dx, s, t, ns, rows, columns && t.w > 0, width);
    }
  free(P);
}

/* What is summed for one term: of_row[r,g] = sum_c column * v, of_column[c] = sum_r row * v, where v is g * x for the
 * terms of scale and g for those of shift. */
typedef struct {
  const T *x, *g; i64 N, C, P, threads; const A *center; i64 center_groups; /* 0 for one per channel */
  Term terms[4]; struct { A *row, *column; } found[4];
} NAME(Sums);

enum { NAME(ROW) = 1, NAME(COLUMN) = 2 };
#define ROW NAME(ROW)
#define COLUMN NAME(COLUMN)

typedef struct { A a, m; const A *k, *M; A *sum, *beside; double *dot; } NAME(Part);

/* One term of scale and two of shift on a span of a row; `center` is ROW, COLUMN or 0. Sums about a center come in two
 * parts: about it, and what it multiplies. */
ALWAYS void NAME(sums_span)(const T *g, const T *x, NAME(Part) s, NAME(Part) h, NAME(Part) e, int scale, int shift,
                            int other, int center, i64 width) {
  A p = 0, q = 0, u = 0, w = 0;
  const A am = center == ROW ? s.a * s.m : s.a;
  ADDING(p, q, u, w) for (i64 c = 0; c < width; c++) {
    const A v = LOAD(g[c]);
    if (scale) {
      const A d = v * (LOAD(x[c]) - (center == ROW ? s.m : center == COLUMN ? s.M[c] : 0));
      if (scale & ROW) {
        const A k = scale & COLUMN ? s.k[c] : 1;
        p += k * d;
        if (center) q += center == COLUMN ? k * v * s.M[c] : k * v;
      }
      if (scale & COLUMN) {
        s.sum[c] += scale & ROW ? s.a * d : d;
        if (center) s.beside[c] += center == ROW || scale & ROW ? am * v : v;
      }
    }
    if (shift & ROW) u += shift & COLUMN ? h.k[c] * v : v;
    if (shift & COLUMN) h.sum[c] += shift & ROW ? h.a * v : v;
    if (other & ROW) w += other & COLUMN ? e.k[c] * v : v;
    if (other & COLUMN) e.sum[c] += other & ROW ? e.a * v : v;
  }
  if (scale & ROW) *s.dot += (double)p + (center == ROW ? (double)s.m * q : (double)q);
  if (shift & ROW) *h.dot += u;
  if (other & ROW) *e.dot += w;
}

/* All of them at once for the combinations that layers have, else one after the other: they are in the cache. */
static void NAME(sums_of)(const T *g, const T *x, const NAME(Part) *parts, const int *kinds, int center, i64 width) {
  const int some = kinds[0] + 4 * kinds[2] + 16 * kinds[3] + 64 * center;
#define SPAN(a, b, c, d) \
  case a + 4 * b + 16 * c + 64 * d: NAME(sums_span)(g, x, parts[0], parts[2], parts[3], a, b, c, d, width); return;
  if (!kinds[1]) switch (some) {
    SPAN(3, 3, 2, 0) SPAN(3, 3, 2, 1) SPAN(3, 3, 2, 2) SPAN(3, 3, 1, 2) SPAN(3, 3, 0, 1) SPAN(3, 3, 0, 2) SPAN(1, 1, 0, 1)
    SPAN(2, 2, 0, 0) SPAN(2, 2, 0, 2) SPAN(1, 1, 0, 0)
  }
#undef SPAN
#define SPAN(a, d) case a + 4 * d: NAME(sums_span)(g, x, parts[t], parts[t], parts[t], a, 0, 0, d, width); break;
  for (int t = 0; t < 2; t++)
    switch (kinds[t] + 4 * center) {
      SPAN(1, 0) SPAN(1, 1) SPAN(1, 2) SPAN(2, 0) SPAN(2, 1) SPAN(2, 2) SPAN(3, 0) SPAN(3, 1) SPAN(3, 2)
    }
#undef SPAN
#define SPAN(a) case a: NAME(sums_span)(g, x, parts[t], parts[t], parts[t], 0, a, 0, 0, width); break;
  for (int t = 2; t < 4; t++) switch (kinds[t]) { SPAN(1) SPAN(2) SPAN(3) }
#undef SPAN
}

/* Sums over the chunks, plus those of what the center multiplies. */
static void NAME(total)(const A *sums, const A *beside, const A *center, A *found, i64 chunks, i64 step, i64 C, int most) {
  const int threads = chunks * C > 1 << 16 ? most : 1; /* less is done before another thread wakes */
  PARALLEL for (i64 c0 = 0; c0 < C; c0 += CHANNELS) {
    const i64 here = smaller(CHANNELS, C - c0);
    double total[CHANNELS] = {0}, rest[CHANNELS] = {0};
    for (i64 k = 0; k < chunks; k++) {
      const A *of_chunk = sums + k * step + c0, *of_rest = beside ? beside + k * step + c0 : NULL;
      for (i64 c = 0; c < here; c++) total[c] += of_chunk[c];
      if (beside) for (i64 c = 0; c < here; c++) rest[c] += of_rest[c];
    }
    for (i64 c = 0; c < here; c++) found[c0 + c] = (A)(total[c] + (center ? center[c0 + c] : 1) * rest[c]);
  }
}

void NAME(sums_cols)(const NAME(Sums) *call) {
  const i64 R = call->N * call->P, C = call->C, chunks = (R + CHUNK - 1) / CHUNK;
  const int threads = (int)call->threads;
  const Term *terms = call->terms;
  Term all[5] = {terms[0], terms[1], terms[2], terms[3], {0}};
  const int center = !call->center ? 0 : call->center_groups ? ROW : COLUMN;
  if (center == ROW) all[4] = (Term){call->center, call->center_groups, NULL};
  const i64 width = NAME(span_of)(all, 5, C);
  i64 slots = 0, slot[6];
  int row_terms = 0, kinds[4];
  for (int t = 0; t < 4; t++) {
    kinds[t] = (terms[t].row ? ROW : 0) | (terms[t].column ? COLUMN : 0);
    slot[t] = terms[t].column ? slots++ : -1;
    row_terms += terms[t].row != NULL;
  }
  for (int t = 0; t < 2; t++) slot[4 + t] = terms[t].column && center ? slots++ : -1;
  /* Sums over the tokens, of each chunk; those of columns alone are taken for blocks of channels by themselves. */
  A *sums = calloc(chunks * slots * C + 1, sizeof(A));
  const i64 part = row_terms ? C : smaller(C, 2 * CHANNELS), blocks = (C + part - 1) / part;
  PARALLEL for (i64 task = 0; task < chunks * blocks; task++) {
    const i64 chunk = task / blocks, start = (task % blocks) * part, stop = smaller(start + part, C);
    A *mine = sums + chunk * slots * C;
    for (i64 r = chunk * CHUNK; r < smaller(R, (chunk + 1) * CHUNK); r++) {
      double dots[4] = {0};
      for (i64 c = start; c < stop;) {
        const i64 here = smaller(smaller(stop - c, BLOCK), width - c % width); /* ends where a group does */
        const A m = center == ROW ? NAME(of_row)(call->center, call->center_groups, r, c, C) : 0;
        NAME(Part) parts[4];
        for (int t = 0; t < 4; t++)
          parts[t] = (NAME(Part)){
              terms[t].row ? NAME(of_row)(terms[t].row, terms[t].groups, r, c, C) : 1, m,
              (const A *)terms[t].column + c, call->center + c, mine + slot[t] * C + c,
              t < 2 ? mine + slot[4 + t] * C + c : NULL, dots + t};
        const T *g = call->g + r * C + c, *x = call->x + r * C + c;
        NAME(sums_of)(g, x, parts, kinds, center, here);
        c += here;
        for (int t = 0; t < 4; t++) {
          if (!terms[t].row) continue;
          const i64 group = C / terms[t].groups;
          if (c % group) continue; /* the group goes on */
          call->found[t].row[(c - 1) / group + r * terms[t].groups] = (A)dots[t];
          dots[t] = 0;
        }
      }
    }
  }
  for (int t = 0; t < 4; t++)
    if (terms[t].column)
      NAME(total)(sums + slot[t] * C, t < 2 && center ? sums + slot[4 + t] * C : NULL, center == COLUMN ? call->center : NULL,
                  call->found[t].column, chunks, slots * C, C, threads);
  free(sums);
}

/* "rows" order. The spans are those of the positions of one channel, and the factors change places: that of the tokens
 * lies along the span, that of the channels is one number. */

/* Equal spans, of whole vectors. */
static i64 NAME(length)(i64 P) {
  const i64 blocks = (P + POSITIONS - 1) / POSITIONS;
  return ((P + blocks - 1) / blocks + 15) / 16 * 16;
}

/* A row factor at the positions of a span, for the group of channel c: in place, or collected when the group begins. */
ALWAYS const A *NAME(along)(const void *row, i64 groups, i64 r, i64 c, i64 C, i64 width, A *collected) {
  const A *table = row;
  if (groups == 1) return table + r;
  if (c % (C / groups) == 0) for (i64 p = 0; p < width; p++) collected[p] = table[(r + p) * groups + c / (C / groups)];
  return collected;
}

ALWAYS void NAME(at_channel)(NAME(Sum) *sum, const Term *terms, int rows, i64 r, i64 c, i64 C, i64 width,
                             A (*collected)[POSITIONS]) {
  for (int t = 0; t < 2; t++) {
    const A a = terms[t].column ? ((const A *)terms[t].column)[c] : t < rows;
    if (t < rows) sum->k[t] = NAME(along)(terms[t].row, terms[t].groups, r, c, C, width, collected[t]), sum->a[t] = a;
    else sum->constant += a;
  }
}

typedef struct { const T *x; A *mean, *var; i64 N, C, P, threads, groups; } NAME(Rows);

void NAME(row_moments_rows)(const NAME(Rows) *call) {
  const i64 N = call->N, C = call->C, P = call->P, length = NAME(length)(P), blocks = (P + length - 1) / length, size = C / call->groups;
  const int threads = (int)call->threads;
  PARALLEL for (i64 task = 0; task < N * blocks; task++) {
    const i64 n = task / blocks, p0 = (task % blocks) * length, width = smaller(P - p0, length);
    for (i64 group = 0; group < call->groups; group++) {
      const T *x = call->x + (n * C + group * size) * P + p0;
      double total[POSITIONS] = {0}, square[POSITIONS] = {0};
      A m[POSITIONS], sum[POSITIONS], rest[POSITIONS];
      for (i64 c0 = 0; c0 < size; c0 += TILE) {
        for (i64 p = 0; p < width; p++) sum[p] = 0;
        for (i64 c = c0; c < smaller(c0 + TILE, size); c++) SIMD for (i64 p = 0; p < width; p++) sum[p] += LOAD(x[c * P + p]);
        for (i64 p = 0; p < width; p++) total[p] += sum[p];
      }
      for (i64 p = 0; p < width; p++) m[p] = (A)(total[p] / (double)size), total[p] = 0;
      for (i64 c0 = 0; c0 < size; c0 += TILE) {
        for (i64 p = 0; p < width; p++) sum[p] = rest[p] = 0;
        for (i64 c = c0; c < smaller(c0 + TILE, size); c++)
          SIMD for (i64 p = 0; p < width; p++) { const A d = LOAD(x[c * P + p]) - m[p]; sum[p] += d * d; rest[p] += d; }
        for (i64 p = 0; p < width; p++) total[p] += rest[p], square[p] += sum[p];
      }
      for (i64 p = 0; p < width; p++) {
        const double off = total[p] / (double)size, v = square[p] / (double)size - off * off;
        const i64 at = (n * P + p0 + p) * call->groups + group;
        call->mean[at] = (A)(m[p] + off);
        call->var[at] = (A)(v < 0 ? 0 : v);
      }
    }
  }
}

void NAME(affine_rows)(const NAME(Affine) *call) {
  const i64 N = call->N, C = call->C, P = call->P, length = NAME(length)(P), blocks = (P + length - 1) / length;
  const int threads = (int)call->threads;
  Term terms[4];
  const int ns = NAME(sorted)(call->scale, 1, terms), nh = NAME(sorted)(call->shift, 1, terms + 2);
  BACKWARDS(task, N * blocks) {
    const i64 n = task / blocks, p = (task % blocks) * length, width = smaller(P - p, length), r = n * P + p;
    A collected[4][POSITIONS];
    for (i64 c = 0; c < C; c++) {
      const i64 at = (n * C + c) * P + p;
      NAME(Sum) s = {0}, h = {0};
      NAME(at_channel)(&s, terms, ns, r, c, C, width, collected);
      NAME(at_channel)(&h, terms + 2, nh, r, c, C, width, collected + 2);
      NAME(affine_of)(call->x + at, call->y + at, s, h, ns, nh, width);
    }
  }
}

void NAME(combine_rows)(const NAME(Combine) *call) {
  const i64 N = call->N, C = call->C, P = call->P, length = NAME(length)(P), blocks = (P + length - 1) / length;
  const int threads = (int)call->threads;
  Term terms[2];
  const int ns = NAME(sorted)(call->scale, 1, terms);
  const A row_factor = (A)(1 / call->rows.size), column_factor = (A)(1 / call->columns.size);
  BACKWARDS(task, N * blocks) {
    const i64 n = task / blocks, p0 = (task % blocks) * length, width = smaller(P - p0, length), r = n * P + p0;
    A collected[2][POSITIONS], mean[POSITIONS], dmean[POSITIONS], dvar[POSITIONS];
    for (i64 c = 0; c < C; c++) {
      const i64 at = (n * C + c) * P + p0;
      NAME(Sum) s = {.constant = (A)call->one};
      NAME(at_channel)(&s, terms, ns, r, c, C, width, collected);
      NAME(Through) t = {.w = 1, .P = dmean, .Q = dvar, .M = mean, .W = call->columns.weights ? call->columns.weights + r : NULL};
      if (call->rows.mean && c % (C / call->rows.groups) == 0)
        for (i64 p = 0; p < width; p++) {
          const i64 k = (r + p) * call->rows.groups + c / (C / call->rows.groups);
          mean[p] = call->rows.mean[k];
          dmean[p] = call->rows.dmean ? call->rows.dmean[k] * row_factor : 0;
          dvar[p] = call->rows.dvar ? 2 * call->rows.dvar[k] * row_factor : 0;
        }
      if (call->columns.mean) {
        t.m = call->columns.mean[c];
        t.p = call->columns.dmean ? call->columns.dmean[c] * column_factor : 0;
        t.q = call->columns.dvar ? 2 * call->columns.dvar[c] * column_factor : 0;
      }
      const int one = !call->columns.mean ? 0 : call->columns.weights ? 2 : 1;
      NAME(combine_of)(call->g + at, call->x + at, call->dx + at, s, t, ns, one, call->rows.mean != NULL, width);
    }
  }
}

void NAME(sums_rows)(const NAME(Sums) *call) {
  const i64 N = call->N, C = call->C, P = call->P, length = NAME(length)(P), blocks = (P + length - 1) / length;
  const int threads = (int)call->threads;
  const Term *terms = call->terms;
  Term all[5] = {terms[0], terms[1], terms[2], terms[3], {0}};
  const int center = !call->center ? 0 : call->center_groups ? COLUMN : ROW;
  if (center == COLUMN) all[4] = (Term){call->center, call->center_groups, NULL};
  const i64 whole = smaller(NAME(span_of)(all, 5, C), C);
  int kinds[4];
  for (int t = 0; t < 4; t++) kinds[t] = (terms[t].column ? ROW : 0) | (terms[t].row ? COLUMN : 0);
  A *sums = malloc((N * blocks * 4 * C + 1) * sizeof(A)); /* of each span, over its positions */
  PARALLEL for (i64 task = 0; task < N * blocks; task++) {
    const i64 n = task / blocks, p0 = (task % blocks) * length, width = smaller(P - p0, length), r = n * P + p0;
    A collected[5][POSITIONS], sum[4][POSITIONS] = {{0}}, beside[2][POSITIONS] = {{0}};
    double total[4][POSITIONS] = {{0}};
    for (i64 c = 0; c < C; c++) {
      const i64 at = (n * C + c) * P + p0;
      const A m = center == ROW ? call->center[c] : 0;
      const A *M = center == COLUMN ? NAME(along)(call->center, call->center_groups, r, c, C, width, collected[4]) : NULL;
      double dots[4] = {0};
      NAME(Part) parts[4];
      for (int t = 0; t < 4; t++)
        parts[t] = (NAME(Part)){
            terms[t].column ? ((const A *)terms[t].column)[c] : 1, m,
            terms[t].row ? NAME(along)(terms[t].row, terms[t].groups, r, c, C, width, collected[t]) : NULL, M, sum[t],
            beside[t % 2], dots + t};
      NAME(sums_of)(call->g + at, call->x + at, parts, kinds, center, width);
      for (int t = 0; t < 4; t++) sums[(task * 4 + t) * C + c] = (A)dots[t];
      if ((c + 1) % whole && (c + 1) % TILE) continue;
      for (int t = 0; t < 4; t++) {
        if (!terms[t].row) continue;
        for (i64 p = 0; p < width; p++) total[t][p] += sum[t][p], sum[t][p] = 0;
        if (t < 2 && center)
          for (i64 p = 0; p < width; p++) total[t][p] += (double)(M ? M[p] : 1) * beside[t][p], beside[t][p] = 0;
        const i64 groups = terms[t].groups, size = C / groups;
        if ((c + 1) % size) continue; /* the group goes on */
        for (i64 p = 0; p < width; p++) call->found[t].row[(r + p) * groups + c / size] = (A)total[t][p], total[t][p] = 0;
      }
    }
  }
  for (int t = 0; t < 4; t++)
    if (terms[t].column) NAME(total)(sums + t * C, NULL, NULL, call->found[t].column, N * blocks, 4 * C, C, threads);
  free(sums);
}
#undef ROW
#undef COLUMN

#endif
