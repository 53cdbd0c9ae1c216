/* One step of SGD-G or Adam-G for rows of many weights in one call; the derivation is in optim/step.py.
 *
 * All a step needs to know of a row are the inner products of the point p, the gradient g and the momentum m. They are
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

/* Numbers of one step that all rows share; but for clip and sign, the names are those of Rotation in optim/step.py. */
typedef struct { double clip, push, scale, keep, beta1, beta2, eps, sign; } Rotation;

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
static double NAME(largest)(const REAL *row, i64 n) {
  double top = 0;
  for (i64 i = 0; i < n; i++) { double a = fabs((double)row[i]); if (a > top) top = a; }
  return top;
}

/* Move one row: point and momentum in place, second_moment likewise. Without momentum, or second moment, or an observer
 * (angle walked, norm of the Riemannian gradient) the pointer is null. scale: that of the rotation, corrected for the
 * age of the weight. */
static void NAME(rotate_row)(REAL *restrict point, const REAL *restrict gradient, REAL *restrict momentum,
                             REAL *restrict second_moment, i64 n, const Rotation *rotation, double scale,
                             REAL *angle, REAL *norm) {
  const double sign = rotation->sign, keep = rotation->keep;
  /* Inner products: pg = <point, gradient> and so on; h is the part of the gradient tangent at the point. */
  double pp = 0, pg = 0, gg = 0, pm = 0, mg = 0, mm = 0, unit = 1;
  if (momentum) {
    #pragma omp simd reduction(+:pp,pg,gg,pm,mg,mm)
    for (i64 i = 0; i < n; i++) {
      double p = point[i], g = gradient[i], m = momentum[i];
      pp += p * p; pg += p * g; gg += g * g; pm += p * m; mg += g * m; mm += m * m; }
  } else {
    #pragma omp simd reduction(+:pp,pg,gg)
    for (i64 i = 0; i < n; i++) { double p = point[i], g = gradient[i]; pp += p * p; pg += p * g; gg += g * g; }
  }
  pg *= sign; mg *= sign;
  const int alive = !(pp == 0);
  double along = alive ? pg / pp : 0, rest = 0, hh = gg - along * pg, mh = mg - along * pm;
  /* Products out of range, or nearly all of the gradient along the row, so that h is what rounding leaves: such a row
   * is taken number by number, and what is left along it is taken out once more. */
  const int careful = !(hh >= 0.1 * gg && gg >= DBL_MIN && gg <= DBL_MAX) && gg != 0;
  if (careful) {
    const double top = gg > DBL_MAX || gg < DBL_MIN ? NAME(largest)(gradient, n) : 1;
    unit = top > 0 && top <= DBL_MAX ? top : 1;
    pg = 0;
    for (i64 i = 0; i < n; i++) pg += point[i] * (sign * gradient[i] / unit);
    along = alive ? pg / pp : 0;
    for (i64 i = 0; i < n; i++) rest += point[i] * (sign * gradient[i] / unit - along * point[i]);
    rest = alive ? rest / pp : 0; hh = 0; mh = 0;
    for (i64 i = 0; i < n; i++) {
      const double h = sign * gradient[i] / unit - along * point[i] - rest * point[i];
      hh += h * h; mh += h * (momentum ? (double)momentum[i] : 0); }
  }
  const double length = sqrt(hh) * unit, clip = length > rotation->clip ? rotation->clip / length : 1;
  if (norm) *norm = (REAL)length;
  if (second_moment) {
    const double clipped = alive ? clip * length : 0, beta2 = rotation->beta2;
    *second_moment = (REAL)(beta2 * *second_moment + (1 - beta2) * clipped * clipped);
    scale /= sqrt(*second_moment + rotation->eps);
  }
  if (!alive) { /* a pruned row has no direction: it stays zero, at rest */
    if (momentum) for (i64 i = 0; i < n; i++) momentum[i] = 0;
    if (angle) *angle = 0;
    return;
  }
  /* e = m + r h: the momentum that d = scale * e walks along; (r unit) (r unit) hh = |r h|^2 without overflow. */
  const double r = momentum ? rotation->push * clip : clip, rh = r * unit;
  const double speed = sqrt(fmax((momentum ? mm + 2 * rh * mh : 0) + rh * rh * hh, 0)), theta = speed * scale;
  const double cosine = cos(theta), sine = sin(theta), inverse = 1 / sqrt(pp);
  const double forth = speed > 0 ? sine / speed : scale;
  if (angle) *angle = (REAL)fabs(theta);
  if (careful) {
    for (i64 i = 0; i < n; i++) {
      const double p = point[i], h = sign * gradient[i] / unit - along * p - rest * p;
      const double e = (momentum ? (double)momentum[i] : 0) + rh * h;
      point[i] = (REAL)(cosine * inverse * p + forth * e);
      if (momentum) momentum[i] = (REAL)(keep * (cosine * e - sine * speed * inverse * p)); }
    return;
  }
  /* a_to_b: the share of the old a in the new b. */
  const REAL point_to_point = (REAL)(cosine * inverse - forth * r * along), gradient_to_point = (REAL)(sign * forth * r);
  if (momentum) {
    const REAL momentum_to_point = (REAL)forth, momentum_to_momentum = (REAL)(keep * cosine);
    const REAL gradient_to_momentum = (REAL)(sign * keep * cosine * r);
    const REAL point_to_momentum = (REAL)(-keep * (cosine * r * along + sine * speed * inverse));
    #pragma omp simd
    for (i64 i = 0; i < n; i++) {
      const REAL p = point[i], g = gradient[i], m = momentum[i];
      point[i] = point_to_point * p + (momentum_to_point * m + gradient_to_point * g);
      momentum[i] = point_to_momentum * p + (momentum_to_momentum * m + gradient_to_momentum * g); }
  } else {
    #pragma omp simd
    for (i64 i = 0; i < n; i++) point[i] = point_to_point * point[i] + gradient_to_point * gradient[i];
  }
}

/* Move all rows of `weights` weights. tasks: (weight, first row, end) each. steps: counters, raised by one here. rows of
 * a weight have lengths[weight] numbers. angles, norms: one number per row. What is not there is null, as above. */
void NAME(rotate)(i64 weights, i64 tasks, const i64 *task, REAL *const *points, const REAL *const *gradients,
                  REAL *const *momenta, REAL *const *second_moments, float *const *steps, const i64 *lengths,
                  REAL *const *angles, REAL *const *norms, const Rotation *rotation, int threads) {
  if (steps) for (i64 k = 0; k < weights; k++) *steps[k] += 1;
  #pragma omp parallel for schedule(dynamic) num_threads(threads) if(threads > 1)
  for (i64 k = 0; k < tasks; k++) {
    const i64 weight = task[3 * k], n = lengths[weight];
    double scale = rotation->scale;
    if (steps) { /* both moments start at zero */
      const double age = *steps[weight];
      scale *= sqrt(1 - pow(rotation->beta2, age)) / (1 - pow(rotation->beta1, age));
    }
    for (i64 row = task[3 * k + 1]; row < task[3 * k + 2]; row++)
      NAME(rotate_row)(points[weight] + row * n, gradients[weight] + row * n, momenta ? momenta[weight] + row * n : 0,
                       second_moments ? second_moments[weight] + row : 0, n, rotation, scale,
                       angles ? angles[weight] + row : 0, norms ? norms[weight] + row : 0);
  }
}

#endif
