/* The passes over tokens, R of them with C channels each, whose tables are sums of at most two outer products: one
 * number for each token (and each of `groups` groups of its neighbouring channels) times one for each channel.
 *
 *   row_moments     mean[r,g], var[r,g]   of each token over the channels of a group
 *   column_moments  mean[c], var[c]       of each channel over the tokens, weighted or not
 *   affine          y  = scale * x + shift
 *   sums            the gradients of the factors of scale and shift for that of y
 *   combine         dx = scale * g + those through moments of the token and of the batch
 *
 * "cols": (R, C) contiguous. Every argument is a word of eight bytes; a call takes one address, that of all of them.
 * Sums are taken in short blocks that are added in double. What is summed over tokens is cut by its shape alone, so that
 * results do not depend on the number of threads.
 */
#ifndef T

#define SELF "tokens.c"
#define CHUNK 128    /* tokens summed at once */
#define TILE 64      /* tokens whose moments are taken at once, of so many channels that all stay in the fastest cache */
#define CHANNELS 128
#define TILES 8      /* in a row, by one thread */

typedef struct { const void *row; long long groups; const void *column; } Term; /* without either, there is none */

#include "each_type.h"

#else

/* The sum of two terms on a span of channels: k0[c] * a[0] + k1[c] * a[1] + constant, with as many k as `columns`. */
typedef struct { const A *k[2]; A a[2], constant; } NAME(Sum);

/* The terms with a column first; how many those are. */
static int NAME(sorted)(const Term *terms, Term *found) {
  int columns = 0, n = 0;
  for (int t = 0; t < 2; t++) if (terms[t].column) found[n++] = terms[t], columns++;
  for (int t = 0; t < 2; t++) if (!terms[t].column && terms[t].row) found[n++] = terms[t];
  for (; n < 2; n++) found[n] = (Term){0};
  return columns;
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

/* Moments merge by Chan's formula, as sums of weights, means and sums of squared deviations. */
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

typedef struct { const T *x; A *mean, *var; i64 R, C, threads; const A *weights; } NAME(Columns);

ALWAYS void NAME(tile)(const T *x, const A *weights, i64 rows, i64 C, i64 width, double *count, double *mean, double *square) {
  A center[CHANNELS], sum[CHANNELS] = {0}, rest[CHANNELS] = {0};
  double n = 0, m[CHANNELS], s[CHANNELS];
  for (i64 r = 0; r < rows; r++) {
    const A w = weights ? weights[r] : 1;
    if (w == 0) continue;
    n += w;
    SIMD for (i64 c = 0; c < width; c++) sum[c] += w * LOAD(x[r * C + c]);
  }
  if (n == 0) return;
  for (i64 c = 0; c < width; c++) center[c] = (A)(sum[c] / n), sum[c] = 0;
  for (i64 r = 0; r < rows; r++) {
    const A w = weights ? weights[r] : 1;
    if (w == 0) continue;
    SIMD for (i64 c = 0; c < width; c++) {
      const A d = LOAD(x[r * C + c]) - center[c], wd = w * d;
      sum[c] += wd * d;
      rest[c] += wd;
    }
  }
  for (i64 c = 0; c < width; c++) {
    const double off = rest[c] / n;
    m[c] = center[c] + off;
    s[c] = sum[c] - off * off * n;
  }
  NAME(merge)(count, mean, square, n, m, s, width);
}

void NAME(column_moments_cols)(const NAME(Columns) *call) {
  const i64 R = call->R, C = call->C, length = TILE * TILES;
  const i64 chunks = (R + length - 1) / length, blocks = (C + CHANNELS - 1) / CHANNELS;
  const int threads = (int)call->threads;
  double *means = calloc(chunks * (2 * C + blocks), sizeof(double)), *squares = means + chunks * C;
  double *counts = squares + chunks * C;
  PARALLEL for (i64 task = 0; task < chunks * blocks; task++) {
    const i64 chunk = task / blocks, c = (task % blocks) * CHANNELS, width = smaller(C - c, CHANNELS);
    for (i64 r = chunk * length; r < smaller(R, (chunk + 1) * length); r += TILE) {
      const i64 rows = smaller(R - r, TILE), at = chunk * C + c;
      const T *x = call->x + r * C + c;
      if (call->weights) NAME(tile)(x, call->weights + r, rows, C, width, counts + task, means + at, squares + at);
      else NAME(tile)(x, NULL, rows, C, width, counts + task, means + at, squares + at);
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
      call->var[c] = (A)(n == 0 || squares[c] < 0 ? 0 : squares[c] / n);
    }
  }
  free(means);
}

typedef struct { const T *x; T *y; i64 R, C, threads; Term scale[2], shift[2]; } NAME(Affine);

ALWAYS void NAME(affine_span)(const T *x, T *y, NAME(Sum) s, NAME(Sum) h, int ns, int nh, i64 width) {
  SIMD for (i64 c = 0; c < width; c++) y[c] = STORE(NAME(sum_at)(&s, ns, c) * LOAD(x[c]) + NAME(sum_at)(&h, nh, c));
}

void NAME(affine_cols)(const NAME(Affine) *call) {
  const i64 R = call->R, C = call->C;
  const int threads = (int)call->threads;
  Term terms[4];
  const int ns = NAME(sorted)(call->scale, terms), nh = NAME(sorted)(call->shift, terms + 2);
  const i64 width = NAME(span_of)(terms, 4, C);
  PARALLEL for (i64 r = 0; r < R; r++)
    for (i64 c = 0; c < C; c += width) {
      NAME(Sum) s = {0}, h = {0};
      NAME(at)(&s, terms, ns, r, c, C);
      NAME(at)(&h, terms + 2, nh, r, c, C);
      const T *x = call->x + r * C + c;
      T *y = call->y + r * C + c;
#define CASE(a, b) case 3 * a + b: NAME(affine_span)(x, y, s, h, a, b, width); break;
      switch (3 * ns + nh) { CASE(0, 0) CASE(0, 1) CASE(0, 2) CASE(1, 0) CASE(1, 1) CASE(1, 2) CASE(2, 0) CASE(2, 1) CASE(2, 2) }
#undef CASE
    }
}

typedef struct {
  const T *g, *x; T *dx; i64 R, C, threads, one; Term scale[2];
  const A *row_mean, *row_dmean, *row_dvar; i64 groups; double row_size;
  const A *column_mean, *column_dmean, *column_dvar, *weights; double column_size;
} NAME(Combine);

typedef struct { A p, q, m, w; const A *P, *Q, *M; } NAME(Through);

ALWAYS void NAME(combine_span)(const T *g, const T *x, T *dx, NAME(Sum) s, NAME(Through) t, int ns, int rows, int columns,
                               i64 width) {
  SIMD for (i64 c = 0; c < width; c++) {
    A d = NAME(sum_at)(&s, ns, c) * LOAD(g[c]);
    if (rows) d += t.p + t.q * (LOAD(x[c]) - t.m);
    if (columns) d += t.w * (t.P[c] + t.Q[c] * (LOAD(x[c]) - t.M[c]));
    dx[c] = STORE(d);
  }
}

void NAME(combine_cols)(const NAME(Combine) *call) {
  const i64 R = call->R, C = call->C;
  const int threads = (int)call->threads;
  const A *weights = call->weights;
  Term terms[3] = {{0}};
  const int ns = NAME(sorted)(call->scale, terms), rows = call->row_mean != NULL, columns = call->column_mean != NULL;
  if (rows) terms[2] = (Term){call->row_mean, call->groups, NULL};
  const i64 width = NAME(span_of)(terms, 3, C), groups = call->groups;
  const A row_factor = (A)(1 / call->row_size), column_factor = (A)(1 / call->column_size);
  A *P = NULL;
  if (columns) {
    P = malloc(2 * C * sizeof(A));
    for (i64 c = 0; c < C; c++) {
      P[c] = call->column_dmean ? call->column_dmean[c] * column_factor : 0;
      P[C + c] = call->column_dvar ? 2 * call->column_dvar[c] * column_factor : 0;
    }
  }
  PARALLEL for (i64 r = 0; r < R; r++)
    for (i64 c = 0; c < C; c += width) {
      NAME(Sum) s = {.constant = (A)call->one};
      NAME(at)(&s, terms, ns, r, c, C);
      NAME(Through) t = {0};
      if (rows) {
        t.m = NAME(of_row)(call->row_mean, groups, r, c, C);
        t.p = call->row_dmean ? NAME(of_row)(call->row_dmean, groups, r, c, C) * row_factor : 0;
        t.q = call->row_dvar ? 2 * NAME(of_row)(call->row_dvar, groups, r, c, C) * row_factor : 0;
      }
      if (columns) t.P = P + c, t.Q = P + C + c, t.M = call->column_mean + c, t.w = weights ? weights[r] : 1;
      const T *g = call->g + r * C + c, *x = call->x + r * C + c;
      T *dx = call->dx + r * C + c;
#define CASE(a, b, d) case 4 * a + 2 * b + d: NAME(combine_span)(g, x, dx, s, t, a, b, d, width); break;
      switch (4 * ns + 2 * rows + (columns && t.w != 0)) {
        CASE(0, 0, 0) CASE(0, 0, 1) CASE(0, 1, 0) CASE(0, 1, 1) CASE(1, 0, 0) CASE(1, 0, 1) CASE(1, 1, 0) CASE(1, 1, 1)
        CASE(2, 0, 0) CASE(2, 0, 1) CASE(2, 1, 0) CASE(2, 1, 1)
      }
#undef CASE
    }
  free(P);
}

/* What is summed for one term: of_row[r,g] = sum_c column * v, of_column[c] = sum_r row * v, where v is g * x for the
 * terms of scale and g for those of shift. */
typedef struct {
  const T *g, *x; i64 R, C, threads; const A *center; i64 center_groups; /* 0 for one per channel */
  Term terms[4]; A *of_row[4], *of_column[4];
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

ALWAYS int NAME(kind)(Term term) { return (term.row ? ROW : 0) | (term.column ? COLUMN : 0); }

#define SPAN(a, b, c, d) case a + 4 * b + 16 * c + 64 * d: NAME(sums_span)(g, x, s, h, e, a, b, c, d, width); return 1;
/* All of them at once for the shapes that layers have; 0 for others. */
static int NAME(sums_of)(const T *g, const T *x, NAME(Part) s, NAME(Part) h, NAME(Part) e, int kinds, i64 width) {
  switch (kinds) {
    SPAN(3, 3, 2, 0) SPAN(3, 3, 2, 1) SPAN(3, 3, 0, 1) SPAN(1, 1, 0, 1) SPAN(2, 2, 0, 0) SPAN(2, 2, 0, 2) /* usual */
    SPAN(1, 0, 0, 0) SPAN(1, 0, 0, 1) SPAN(1, 0, 0, 2) SPAN(2, 0, 0, 0) SPAN(2, 0, 0, 1) SPAN(2, 0, 0, 2)
    SPAN(3, 0, 0, 0) SPAN(3, 0, 0, 1) SPAN(3, 0, 0, 2) SPAN(0, 1, 0, 0) SPAN(0, 2, 0, 0) SPAN(0, 3, 0, 0)
  }
  return 0;
}
#undef SPAN

void NAME(sums_cols)(const NAME(Sums) *call) {
  const i64 R = call->R, C = call->C, chunks = (R + CHUNK - 1) / CHUNK;
  const int threads = (int)call->threads;
  const Term *terms = call->terms;
  Term all[5] = {terms[0], terms[1], terms[2], terms[3], {0}};
  const int center = !call->center ? 0 : call->center_groups ? ROW : COLUMN;
  if (center == ROW) all[4] = (Term){call->center, call->center_groups, NULL};
  const i64 width = NAME(span_of)(all, 5, C);
  i64 slots = 0, slot[6];
  int row_terms = 0;
  for (int t = 0; t < 4; t++) {
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
        NAME(Part) parts[5] = {{0}};
        for (int t = 0; t < 4; t++)
          parts[t] = (NAME(Part)){
              terms[t].row ? NAME(of_row)(terms[t].row, terms[t].groups, r, c, C) : 1, m,
              (const A *)terms[t].column + c, call->center + c, mine + slot[t] * C + c,
              t < 2 ? mine + slot[4 + t] * C + c : NULL, dots + t};
        const T *g = call->g + r * C + c, *x = call->x + r * C + c;
        const int s0 = NAME(kind)(terms[0]), s1 = NAME(kind)(terms[1]), h0 = NAME(kind)(terms[2]), h1 = NAME(kind)(terms[3]);
        if (s1 || !NAME(sums_of)(g, x, parts[0], parts[2], parts[3], s0 + 4 * h0 + 16 * h1 + 64 * center, here)) {
          if (s0) NAME(sums_of)(g, x, parts[0], parts[4], parts[4], s0 + 64 * center, here);
          if (s1) NAME(sums_of)(g, x, parts[1], parts[4], parts[4], s1 + 64 * center, here);
          if (h0) NAME(sums_of)(g, x, parts[4], parts[2], parts[4], 4 * h0, here);
          if (h1) NAME(sums_of)(g, x, parts[4], parts[3], parts[4], 4 * h1, here);
        }
        c += here;
        for (int t = 0; t < 4; t++) {
          if (!terms[t].row) continue;
          const i64 group = C / terms[t].groups;
          if (c % group) continue; /* the group goes on */
          call->of_row[t][(c - 1) / group + r * terms[t].groups] = (A)dots[t];
          dots[t] = 0;
        }
      }
    }
  }
  for (int t = 0; t < 4; t++) {
    if (!terms[t].column) continue;
    PARALLEL for (i64 c0 = 0; c0 < C; c0 += CHANNELS) {
      const i64 here = smaller(CHANNELS, C - c0);
      double total[CHANNELS] = {0};
      for (i64 k = 0; k < chunks; k++) {
        const A *of_chunk = sums + (k * slots + slot[t]) * C + c0;
        for (i64 c = 0; c < here; c++) total[c] += of_chunk[c];
      }
      if (t < 2 && center) {
        double beside[CHANNELS] = {0};
        for (i64 k = 0; k < chunks; k++) {
          const A *of_chunk = sums + (k * slots + slot[4 + t]) * C + c0;
          for (i64 c = 0; c < here; c++) beside[c] += of_chunk[c];
        }
        for (i64 c = 0; c < here; c++) total[c] += (center == COLUMN ? call->center[c0 + c] : 1) * beside[c];
      }
      for (i64 c = 0; c < here; c++) call->of_column[t][c0 + c] = (A)total[c];
    }
  }
  free(sums);
}
#undef ROW
#undef COLUMN

#endif
