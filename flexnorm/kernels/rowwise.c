/* The backward of tokens, (R, C) or at the positions of (N, C, P), that are normalized by moments of their own, in one pass: each token's sums, and its
 * gradient while it is still in cache.
 *
 *   y = k (r x + q) + b        r, q one number for each token, functions of its mean (or 0) and variance (or mean
 *                              square); k, b one for each channel, where there are any
 *   dr = sum_c g k x, dq = sum_c g k;  dmean, dvar by the derivatives of r and q, which come along
 *   dx = r k g + (dmean + 2 dvar (x - mean)) / C;  dk = sum_r g (r x + q), db = sum_r g
 *
 * What is summed over tokens is cut by its shape alone, so that results do not depend on the number of threads.
 */
#ifndef T

#define SELF "rowwise.c"
#define CHUNKS 64 /* at most, each summed by itself */
#define TOKENS 64 /* summed in the accumulation type before they are added in double */
#define SPAN 128  /* positions at once */
#define DEEP 256  /* channels summed in the accumulation type */

#include "each_type.h"

#else

typedef struct {
  const T *g, *x;
  T *dx;
  const A *mean, *r, *q, *k, *r_mean, *r_var, *q_mean, *q_var; /* null: zero, for k one */
  A *dk, *db;
  i64 R, C, P, threads; /* P positions of a sample, where a token is at each of them: (N, C, P) */
} NAME(Call);

ALWAYS void NAME(token)(const NAME(Call) *o, i64 t, A *dk, A *db, int with_k, int with_q, int with_sums) {
  const i64 C = o->C;
  const T *g = o->g + t * C, *x = o->x + t * C;
  T *out = o->dx + t * C;
  const A m = o->mean ? o->mean[t] : 0, r = o->r[t], q = with_q ? o->q[t] : 0, *k = o->k;
  double first = 0, zeroth = 0;
  for (i64 c0 = 0; c0 < C; c0 += BLOCK) {
    const i64 c1 = smaller(c0 + BLOCK, C);
    A p = 0, s = 0;
    ADDING(p, s) for (i64 c = c0; c < c1; c++) {
      const A v = with_k ? LOAD(g[c]) * k[c] : LOAD(g[c]);
      p += v * (LOAD(x[c]) - m);
      s += v;
    }
    first += p;
    zeroth += s;
  }
  const double dr = first + (double)m * zeroth;
  double dmean = 0, dvar = 0;
  if (o->r_mean) dmean += o->r_mean[t] * dr;
  if (o->r_var) dvar += o->r_var[t] * dr;
  if (o->q_mean) dmean += o->q_mean[t] * zeroth;
  if (o->q_var) dvar += o->q_var[t] * zeroth;
  const A a = (A)(dmean / C), b = (A)(2 * dvar / C);
  SIMD for (i64 c = 0; c < C; c++) {
    const A v = LOAD(g[c]), w = LOAD(x[c]);
    out[c] = STORE((with_k ? v * k[c] : v) * r + (a + b * (w - m)));
    if (with_sums) {
      dk[c] += v * (with_q ? r * w + q : r * w);
      db[c] += v;
    }
  }
}

ALWAYS void NAME(tokens)(const NAME(Call) *o, i64 start, i64 end, A *dk, A *db, int with_k, int with_q, int with_sums) {
  for (i64 t = start; t < end; t++) NAME(token)(o, t, dk, db, with_k, with_q, with_sums);
}

void NAME(rowwise_cols)(const NAME(Call) *o) {
  const i64 R = o->R, C = o->C, least = (R + CHUNKS - 1) / CHUNKS, height = least > TOKENS ? least : TOKENS;
  const i64 chunks = (R + height - 1) / height;
  const int threads = (int)o->threads, sums = o->dk != 0;
  double *total = sums ? calloc(chunks * 2 * C, sizeof(double)) : 0;
  A *part = sums ? malloc(chunks * 2 * C * sizeof(A)) : 0;
  PARALLEL for (i64 chunk = 0; chunk < chunks; chunk++) {
    A *dk = sums ? part + chunk * 2 * C : 0, *db = sums ? dk + C : 0;
    const i64 last = smaller((chunk + 1) * height, R);
    for (i64 start = chunk * height; start < last; start += TOKENS) {
      const i64 end = smaller(start + TOKENS, last);
      for (i64 c = 0; sums && c < 2 * C; c++) dk[c] = 0;
      if (o->k && o->q && sums) NAME(tokens)(o, start, end, dk, db, 1, 1, 1);
      else if (o->k && sums) NAME(tokens)(o, start, end, dk, db, 1, 0, 1);
      else if (o->k && o->q) NAME(tokens)(o, start, end, dk, db, 1, 1, 0);
      else if (o->k) NAME(tokens)(o, start, end, dk, db, 1, 0, 0);
      else if (sums) NAME(tokens)(o, start, end, dk, db, 0, o->q != 0, 1);
      else NAME(tokens)(o, start, end, dk, db, 0, o->q != 0, 0);
      for (i64 c = 0; sums && c < 2 * C; c++) total[chunk * 2 * C + c] += dk[c];
    }
  }
  if (!sums) return;
  for (i64 chunk = 1; chunk < chunks; chunk++)
    for (i64 c = 0; c < 2 * C; c++) total[c] += total[chunk * 2 * C + c];
  for (i64 c = 0; c < C; c++) { o->dk[c] = (A)total[c]; o->db[c] = (A)total[C + c]; }
  free(total);
  free(part);
}

/* Positions p0 to p0 + width of sample n. */
ALWAYS void NAME(span)(const NAME(Call) *o, i64 n, i64 p0, i64 width, double *dk, double *db, int with_k, int with_q) {
  const i64 C = o->C, P = o->P, at = n * P + p0;
  const A *k = o->k;
  A m[SPAN], r[SPAN], q[SPAN], a[SPAN], b[SPAN], p[SPAN], s[SPAN];
  double first[SPAN], zeroth[SPAN];
  for (i64 i = 0; i < width; i++) {
    m[i] = o->mean ? o->mean[at + i] : 0;
    r[i] = o->r[at + i];
    q[i] = with_q ? o->q[at + i] : 0;
    first[i] = zeroth[i] = 0;
  }
  for (i64 c0 = 0; c0 < C; c0 += DEEP) {
    for (i64 i = 0; i < width; i++) p[i] = s[i] = 0;
    for (i64 c = c0; c < smaller(c0 + DEEP, C); c++) {
      const T *g = o->g + (n * C + c) * P + p0, *x = o->x + (n * C + c) * P + p0;
      const A w = with_k ? k[c] : 1;
      SIMD for (i64 i = 0; i < width; i++) {
        const A v = w * LOAD(g[i]);
        p[i] += v * (LOAD(x[i]) - m[i]);
        s[i] += v;
      }
    }
    for (i64 i = 0; i < width; i++) { first[i] += p[i]; zeroth[i] += s[i]; }
  }
  for (i64 i = 0; i < width; i++) {
    const i64 t = at + i;
    const double dr = first[i] + (double)m[i] * zeroth[i];
    double dmean = 0, dvar = 0;
    if (o->r_mean) dmean += o->r_mean[t] * dr;
    if (o->r_var) dvar += o->r_var[t] * dr;
    if (o->q_mean) dmean += o->q_mean[t] * zeroth[i];
    if (o->q_var) dvar += o->q_var[t] * zeroth[i];
    a[i] = (A)(dmean / C);
    b[i] = (A)(2 * dvar / C);
  }
  for (i64 c = 0; c < C; c++) {
    const T *g = o->g + (n * C + c) * P + p0, *x = o->x + (n * C + c) * P + p0;
    T *out = o->dx + (n * C + c) * P + p0;
    const A w = with_k ? k[c] : 1;
    A of_k = 0, of_b = 0;
    ADDING(of_k, of_b) for (i64 i = 0; i < width; i++) {
      const A v = LOAD(g[i]), u = LOAD(x[i]);
      out[i] = STORE(v * w * r[i] + (a[i] + b[i] * (u - m[i])));
      of_k += v * (with_q ? r[i] * u + q[i] : r[i] * u);
      of_b += v;
    }
    if (dk) { dk[c] += of_k; db[c] += of_b; }
  }
}

void NAME(rowwise_rows)(const NAME(Call) *o) {
  const i64 C = o->C, P = o->P, spans = (P + SPAN - 1) / SPAN, tasks = o->R / P * spans;
  const i64 height = (tasks + CHUNKS - 1) / CHUNKS, chunks = (tasks + height - 1) / height;
  const int threads = (int)o->threads, sums = o->dk != 0;
  double *total = sums ? calloc(chunks * 2 * C, sizeof(double)) : 0;
  PARALLEL for (i64 chunk = 0; chunk < chunks; chunk++) {
    double *dk = sums ? total + chunk * 2 * C : 0, *db = sums ? dk + C : 0;
    for (i64 task = chunk * height; task < smaller((chunk + 1) * height, tasks); task++) {
      const i64 n = task / spans, p0 = task % spans * SPAN, width = smaller(SPAN, P - p0);
      if (o->k && o->q) NAME(span)(o, n, p0, width, dk, db, 1, 1);
      else NAME(span)(o, n, p0, width, dk, db, o->k != 0, o->q != 0);
    }
  }
  if (!sums) return;
  for (i64 chunk = 1; chunk < chunks; chunk++)
    for (i64 c = 0; c < 2 * C; c++) total[c] += total[chunk * 2 * C + c];
  for (i64 c = 0; c < C; c++) { o->dk[c] = (A)total[c]; o->db[c] = (A)total[C + c]; }
  free(total);
}

#endif
