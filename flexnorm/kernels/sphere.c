/* One step of SGD-G or Adam-G for rows of many weights in one call; the derivation is in kernels.py.
 *
 * All a step needs to know of a row are the inner products of the point p, the gradient g and the momentum t. They are
 * taken in one pass, in double, so that a float32 row of any finite length neither overflows nor vanishes. The new point
 * and the new momentum are then combinations of the old three with numbers of the row as coefficients: one pass more,
 * over a row that is still in the cache. So memory sees each number once, as with plain SGD.
 *
 * Rows are shared out between threads in tasks that the caller cuts; nothing is added up across rows or tasks, so the
 * result does not depend on the number of threads. The file includes itself once per type of number.
 */
#ifndef REAL

#include <float.h>
#include <math.h>
#include <stdint.h>

typedef int64_t i64;

/* Numbers of one step that all rows share; the names are those of Walk in kernels.py. */
typedef struct { double clip, push, scale, keep, beta1, beta2, eps, sign; } Walk;

#define REAL float
#define NAME(x) x##_f32
#include "sphere.c"
#undef REAL
#undef NAME
#define REAL double
#define NAME(x) x##_f64
#include "sphere.c"

#else

/* The largest magnitude in a row, to scale a row whose products leave the range of doubles (float64 only). */
static double NAME(largest)(const REAL *g, i64 n) {
  double top = 0;
  for (i64 i = 0; i < n; i++) { double a = fabs((double)g[i]); if (a > top) top = a; }
  return top;
}

/* Move one row. Without momentum t is a null pointer, without second moment v is; angle and norm are for observers. */
static void NAME(move)(REAL *restrict p, const REAL *restrict g, REAL *restrict t, REAL *restrict v, i64 n,
                       const Walk *w, double scale, REAL *angle, REAL *norm) {
  double pp = 0, pg = 0, gg = 0, pt = 0, tg = 0, tt = 0, unit = 1;
  if (t) {
    #pragma omp simd reduction(+:pp,pg,gg,pt,tg,tt)
    for (i64 i = 0; i < n; i++) {
      double a = p[i], b = g[i], c = t[i];
      pp += a * a; pg += a * b; gg += b * b; pt += a * c; tg += b * c; tt += c * c; }
  } else {
    #pragma omp simd reduction(+:pp,pg,gg)
    for (i64 i = 0; i < n; i++) { double a = p[i], b = g[i]; pp += a * a; pg += a * b; gg += b * b; }
  }
  pg *= w->sign; tg *= w->sign;
  const int alive = !(pp == 0);
  double along = alive ? pg / pp : 0, rest = 0, hh = gg - along * pg, th = tg - along * pt;
  /* Products out of range, or nearly all of the gradient along the row, so that h is what rounding leaves: such a row
   * is taken number by number, and what is left along it is taken out once more. */
  const int careful = !(hh >= 0.1 * gg && gg >= DBL_MIN && gg <= DBL_MAX) && gg != 0;
  if (careful) {
    const double top = gg > DBL_MAX || gg < DBL_MIN ? NAME(largest)(g, n) : 1;
    unit = top > 0 && top <= DBL_MAX ? top : 1;
    pg = 0;
    for (i64 i = 0; i < n; i++) pg += p[i] * (w->sign * g[i] / unit);
    along = alive ? pg / pp : 0;
    for (i64 i = 0; i < n; i++) rest += p[i] * (w->sign * g[i] / unit - along * p[i]);
    rest = alive ? rest / pp : 0; hh = 0; th = 0;
    for (i64 i = 0; i < n; i++) {
      const double h = w->sign * g[i] / unit - along * p[i] - rest * p[i];
      hh += h * h; th += h * (t ? (double)t[i] : 0); }
  }
  const double length = sqrt(hh) * unit, clip = length > w->clip ? w->clip / length : 1;
  if (norm) *norm = (REAL)length;
  if (v) {
    double kept = alive ? clip * length : 0;
    *v = (REAL)(w->beta2 * *v + (1 - w->beta2) * kept * kept);
    scale /= sqrt(*v + w->eps);
  }
  if (!alive) { /* a pruned row has no direction: it stays zero, at rest */
    if (t) for (i64 i = 0; i < n; i++) t[i] = 0;
    if (angle) *angle = 0;
    return;
  }
  /* e = t + r h: the momentum that d = scale * e walks along; (r unit) (r unit) hh = |r h|^2 without overflow. */
  const double r = t ? w->push * clip : clip, rh = r * unit;
  const double speed = sqrt(fmax((t ? tt + 2 * rh * th : 0) + rh * rh * hh, 0)), theta = speed * scale;
  const double cosine = cos(theta), sine = sin(theta), inverse = 1 / sqrt(pp);
  const double forth = speed > 0 ? sine / speed : scale;
  if (angle) *angle = (REAL)fabs(theta);
  if (careful) {
    for (i64 i = 0; i < n; i++) {
      const double a = p[i], h = w->sign * g[i] / unit - along * a - rest * a, e = (t ? (double)t[i] : 0) + rh * h;
      p[i] = (REAL)(cosine * inverse * a + forth * e);
      if (t) t[i] = (REAL)(w->keep * (cosine * e - sine * speed * inverse * a)); }
    return;
  }
  const REAL p_p = (REAL)(cosine * inverse - forth * r * along), g_p = (REAL)(w->sign * forth * r);
  if (t) {
    const REAL t_p = (REAL)forth, t_t = (REAL)(w->keep * cosine), g_t = (REAL)(w->sign * w->keep * cosine * r);
    const REAL p_t = (REAL)(-w->keep * (cosine * r * along + sine * speed * inverse));
    #pragma omp simd
    for (i64 i = 0; i < n; i++) {
      const REAL a = p[i], b = g[i], c = t[i];
      p[i] = p_p * a + (t_p * c + g_p * b); t[i] = p_t * a + (t_t * c + g_t * b); }
  } else {
    #pragma omp simd
    for (i64 i = 0; i < n; i++) p[i] = p_p * p[i] + g_p * g[i];
  }
}

/* Move all rows of `weights` weights. tasks: (weight, first row, end) each. steps: counters, raised by one here, or null.
 * t and v hold null where there is no momentum or second moment. angle, norm: one number per row each, or null. */
void NAME(walk)(i64 weights, i64 tasks, const i64 *task, REAL *const *p, const REAL *const *g, REAL *const *t,
                REAL *const *v, float *const *steps, const i64 *n, REAL *const *angle, REAL *const *norm,
                const Walk *w, int threads) {
  if (steps) for (i64 k = 0; k < weights; k++) *steps[k] += 1;
  #pragma omp parallel for schedule(dynamic) num_threads(threads) if(threads > 1)
  for (i64 k = 0; k < tasks; k++) {
    const i64 which = task[3 * k], size = n[which];
    double scale = w->scale;
    if (steps) scale *= sqrt(1 - pow(w->beta2, *steps[which])) / (1 - pow(w->beta1, *steps[which]));
    for (i64 row = task[3 * k + 1]; row < task[3 * k + 2]; row++)
      NAME(move)(p[which] + row * size, g[which] + row * size, t ? t[which] + row * size : 0, v ? v[which] + row : 0,
                 size, w, scale, angle ? angle[which] + row : 0, norm ? norm[which] + row : 0);
  }
}

#endif
