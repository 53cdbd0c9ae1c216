/* y = max(u + shift, low) with one shift and one bound per channel (y may be u), and its backward in one pass.
 *
 * Two layouts: contiguous (`inner` positions of one channel in a piece) and channels last (inner = 1, a row of C numbers
 * per position). Sums over a channel are taken in an order that does not depend on the number of threads.
 */
#include <stdint.h>
#include <stdlib.h>

typedef int64_t i64;

enum { ROWS = 256 }; /* positions whose sums stay in float, channels last */

void clamp_forward(i64 outer, i64 channels, i64 inner, const float *u, float *y, unsigned char *mask,
                   const float *shift, const float *low, int threads) {
  if (inner > 1) {
    #pragma omp parallel for num_threads(threads) if(threads > 1)
    for (i64 k = 0; k < outer * channels; k++) {
      const float *x = u + k * inner;
      float *z = y + k * inner;
      unsigned char *restrict m = mask ? mask + k * inner : 0;
      const float s = shift[k % channels], f = low[k % channels];
      if (m) for (i64 i = 0; i < inner; i++) { const float a = x[i] + s; m[i] = !(a <= f); z[i] = a < f ? f : a; }
      else for (i64 i = 0; i < inner; i++) { const float a = x[i] + s; z[i] = a < f ? f : a; }
    }
    return;
  }
  #pragma omp parallel for num_threads(threads) if(threads > 1)
  for (i64 row = 0; row < outer; row++) {
    const float *x = u + row * channels;
    float *z = y + row * channels;
    unsigned char *restrict m = mask ? mask + row * channels : 0;
    for (i64 c = 0; c < channels; c++) {
      const float a = x[c] + shift[c];
      if (m) m[c] = !(a <= low[c]);
      z[c] = a < low[c] ? low[c] : a; }
  }
}

/* d receives g where mask is 1 (y above its bound), 0 elsewhere; above and below the sums of g there and elsewhere, (C). Returns
 * 0, or 1 where there is no memory for the partial sums. */
int clamp_backward(i64 outer, i64 channels, i64 inner, const float *g, const unsigned char *mask, float *d,
                   float *above, float *below, int threads) {
  if (inner > 1) {
    #pragma omp parallel for num_threads(threads) if(threads > 1)
    for (i64 c = 0; c < channels; c++) {
      double sum_above = 0, sum_below = 0;
      for (i64 n = 0; n < outer; n++) {
        const i64 start = (n * channels + c) * inner;
        const float *restrict a = g + start;
        const unsigned char *restrict b = mask + start;
        float *restrict out = d + start;
        float s = 0, t = 0;
        #pragma omp simd reduction(+:s,t)
        for (i64 i = 0; i < inner; i++) {
          const float kept = b[i] ? a[i] : 0;
          out[i] = kept; s += kept; t += a[i] - kept; }
        sum_above += s; sum_below += t;
      }
      above[c] = (float)sum_above; below[c] = (float)sum_below;
    }
    return 0;
  }
  const i64 chunks = (outer + ROWS - 1) / ROWS;
  float *partial = calloc((size_t)(2 * chunks * channels + 1), sizeof(float));
  if (!partial) return 1;
  #pragma omp parallel for num_threads(threads) if(threads > 1)
  for (i64 k = 0; k < chunks; k++) {
    float *restrict s = partial + 2 * k * channels, *restrict t = s + channels;
    const i64 end = (k + 1) * ROWS < outer ? (k + 1) * ROWS : outer;
    for (i64 row = k * ROWS; row < end; row++) {
      const float *restrict a = g + row * channels;
      const unsigned char *restrict b = mask + row * channels;
      float *restrict out = d + row * channels;
      #pragma omp simd
      for (i64 c = 0; c < channels; c++) {
        const float kept = b[c] ? a[c] : 0;
        out[c] = kept; s[c] += kept; t[c] += a[c] - kept; }
    }
  }
  #pragma omp parallel for num_threads(threads) if(threads > 1)
  for (i64 c = 0; c < channels; c++) {
    double sum_above = 0, sum_below = 0;
    for (i64 k = 0; k < chunks; k++) {
      sum_above += partial[2 * k * channels + c]; sum_below += partial[(2 * k + 1) * channels + c]; }
    above[c] = (float)sum_above; below[c] = (float)sum_below;
  }
  free(partial);
  return 0;
}
