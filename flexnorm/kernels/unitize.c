/* Unitized batch normalization of tokens (R, C), both ways in as few passes as batch normalization takes: each token's
 * norm and its result while it is in cache. With d = x - m, p = 1 / (v + eps), the token's s = sum_c p d^2 / divisor
 * and q = (s + eps)^-1/2:
 *
 *   y = d (a + e q) + bias,   a = weight (1 - alpha) p^1/2,   e = weight alpha p^1/2
 *
 * backward, with dq = sum_c g d e and t = -q^3 dq / (2 divisor):  dd = g (a + e q) + 2 t p d, and over the tokens the
 * sums of g, g d, g q, g d q, t d and t d^2, of which all gradients of m, v, weight, bias and alpha are made.
 *
 * What is summed over tokens is cut by its shape alone, so that results do not depend on the number of threads.
 */
#ifndef T

#define SELF "unitize.c"
#define CHUNKS 64 /* at most, each summed by itself */
#define SUMS 6
#define TOKENS 64 /* summed in the accumulation type before they are added in double */

#include "each_type.h"

#elif defined(WIDE) /* float32 and float64; others are widened before */

typedef struct { A *a, *e, *p; } NAME(Tables);

/* Three rows of C numbers; freed by the caller through the first. */
static NAME(Tables) NAME(tables)(const A *v, const A *weight, const A *alpha, double eps, i64 C) {
  A *memory = malloc(3 * C * sizeof(A));
  NAME(Tables) tables = {memory, memory + C, memory + 2 * C};
  for (i64 c = 0; c < C; c++) {
    const A power = 1 / (v[c] + (A)eps), k = (weight ? weight[c] : 1) * (A)sqrt(power);
    tables.p[c] = power;
    tables.a[c] = k * (1 - alpha[c]);
    tables.e[c] = k * alpha[c];
  }
  return tables;
}

void NAME(forward)(const A *x, const A *m, const A *v, const A *weight, const A *bias, const A *alpha, double eps,
                   double divisor, A *y, A *q, i64 R, i64 C, int threads) {
  const NAME(Tables) k = NAME(tables)(v, weight, alpha, eps, C);
  PARALLEL for (i64 r = 0; r < R; r++) {
    const A *row = x + r * C;
    A *out = y + r * C;
    double s = 0;
    for (i64 c0 = 0; c0 < C; c0 += BLOCK) {
      const i64 c1 = smaller(c0 + BLOCK, C);
      A part = 0;
      ADDING(part) for (i64 c = c0; c < c1; c++) { const A d = row[c] - m[c]; part += d * d * k.p[c]; }
      s += part;
    }
    const A root = q[r] = (A)(1 / sqrt(s / divisor + eps));
    if (bias) { SIMD for (i64 c = 0; c < C; c++) out[c] = (row[c] - m[c]) * (k.a[c] + k.e[c] * root) + bias[c]; }
    else { SIMD for (i64 c = 0; c < C; c++) out[c] = (row[c] - m[c]) * (k.a[c] + k.e[c] * root); }
  }
  free(k.a);
}

/* dx of statistics that are those of the tokens themselves (`of_batch`) or constants; gradients of the parameters. */
void NAME(backward)(const A *g, const A *x, const A *m, const A *v, const A *weight, const A *alpha, const A *q,
                    double eps, double divisor, int of_batch, A *dx, A *dweight, A *dbias, A *dalpha, i64 R, i64 C,
                    int threads) {
  const NAME(Tables) k = NAME(tables)(v, weight, alpha, eps, C);
  const i64 height = (R + CHUNKS - 1) / CHUNKS > TOKENS ? (R + CHUNKS - 1) / CHUNKS : TOKENS;
  const i64 chunks = (R + height - 1) / height, width = SUMS * C;
  double *sums = calloc(chunks * width, sizeof(double));
  A *turn = malloc((R + chunks * width + 2 * C) * sizeof(A)), *parts = turn + R, *slope = parts + chunks * width;
  A *constant = slope + C;
  PARALLEL for (i64 chunk = 0; chunk < chunks; chunk++) {
    double *sum = sums + chunk * width;
    A *part = parts + chunk * width, *sg = part, *sgd = part + C, *sgq = part + 2 * C, *sgdq = part + 3 * C;
    A *std_ = part + 4 * C, *stdd = part + 5 * C;
    const i64 end = smaller((chunk + 1) * height, R);
    for (i64 start = chunk * height; start < end; start += TOKENS) {
      for (i64 c = 0; c < width; c++) part[c] = 0;
      for (i64 r = start; r < smaller(start + TOKENS, end); r++) {
        const A *gs = g + r * C, *xs = x + r * C, root = q[r];
        double dq = 0;
        for (i64 c0 = 0; c0 < C; c0 += BLOCK) {
          const i64 c1 = smaller(c0 + BLOCK, C);
          A inner = 0;
          ADDING(inner) for (i64 c = c0; c < c1; c++) inner += gs[c] * (xs[c] - m[c]) * k.e[c];
          dq += inner;
        }
        const A t = turn[r] = (A)(-0.5 * dq * root * root * root / divisor);
        SIMD for (i64 c = 0; c < C; c++) {
          const A v0 = gs[c], d = xs[c] - m[c], gd = v0 * d, td = t * d;
          sg[c] += v0;
          sgd[c] += gd;
          sgq[c] += v0 * root;
          sgdq[c] += gd * root;
          std_[c] += td;
          stdd[c] += td * d;
        }
      }
      for (i64 c = 0; c < width; c++) sum[c] += part[c];
    }
  }
  for (i64 chunk = 1; chunk < chunks; chunk++) for (i64 c = 0; c < width; c++) sums[c] += sums[chunk * width + c];
  for (i64 c = 0; c < C; c++) {
    const double *s = sums + c, power = k.p[c], inverse = sqrt(power), w = weight ? weight[c] : 1;
    const double gd_gain = (1 - (double)alpha[c]) * s[C] + alpha[c] * s[3 * C]; /* sum g d (1 - alpha + alpha q) */
    const double dm = -(k.a[c] * s[0] + k.e[c] * s[2 * C] + 2 * power * s[4 * C]);
    const double dv = -power * (0.5 * inverse * w * gd_gain + power * s[5 * C]);
    dweight[c] = (A)(inverse * gd_gain);
    dbias[c] = (A)s[0];
    dalpha[c] = (A)(w * inverse * (s[3 * C] - s[C]));
    constant[c] = of_batch ? (A)(dm / R) : 0;
    slope[c] = of_batch ? (A)(2 * dv / R) : 0;
  }
  PARALLEL for (i64 r = 0; r < R; r++) {
    const A *gs = g + r * C, *xs = x + r * C, root = q[r], t = 2 * turn[r];
    A *out = dx + r * C;
    SIMD for (i64 c = 0; c < C; c++)
      out[c] = gs[c] * (k.a[c] + k.e[c] * root) + (t * k.p[c] + slope[c]) * (xs[c] - m[c]) + constant[c];
  }
  free(k.a);
  free(sums);
  free(turn);
}

#endif
