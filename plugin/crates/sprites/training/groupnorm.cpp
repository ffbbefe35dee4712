// GroupNorm over channels-last tensors (n images of p pixels by c channels), bf16 or f32.
// Only sums over pixels are taken, channel by channel, so that every inner loop is a straight vector loop.
#include <torch/extension.h>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

using Floats = std::vector<float>;

static inline float get(const uint16_t *p) { uint32_t u = uint32_t(*p) << 16; float f; std::memcpy(&f, &u, 4); return f; }
static inline float get(const float *p) { return *p; }
static inline void put(float *p, float f) { *p = f; }
static inline void put(uint16_t *p, float f) {
  uint32_t u; std::memcpy(&u, &f, 4);
  *p = uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

struct Shape { int64_t n, p, c, groups; };

template <class T>
static void forward(const T *x, T *y, const float *gamma, const float *beta, float *mean, float *rstd, Shape s, float eps) {
  const int64_t width = s.c / s.groups;
  Floats sum(s.c), square(s.c), scale(s.c), shift(s.c);
  for (int64_t i = 0; i < s.n; i++, x += s.p * s.c, y += s.p * s.c, mean += s.groups, rstd += s.groups) {
    std::fill(sum.begin(), sum.end(), 0.f);
    std::fill(square.begin(), square.end(), 0.f);
    float *a = sum.data(), *b = square.data();
    for (int64_t p = 0; p < s.p; p++)
      for (int64_t c = 0; c < s.c; c++) { float v = get(x + p * s.c + c); a[c] += v; b[c] += v * v; }
    for (int64_t g = 0; g < s.groups; g++) {
      double first = 0, second = 0, count = double(s.p) * width;
      for (int64_t c = g * width; c < (g + 1) * width; c++) { first += a[c]; second += b[c]; }
      double m = first / count, var = std::max(0.0, second / count - m * m);
      mean[g] = m; rstd[g] = 1.0 / std::sqrt(var + eps);
      for (int64_t c = g * width; c < (g + 1) * width; c++) { scale[c] = gamma[c] * rstd[g]; shift[c] = beta[c] - mean[g] * scale[c]; }
    }
    a = scale.data(); b = shift.data();
    for (int64_t p = 0; p < s.p; p++)
      for (int64_t c = 0; c < s.c; c++) put(y + p * s.c + c, get(x + p * s.c + c) * a[c] + b[c]);
  }
}

template <class T>
static void backward(const T *x, const T *dy, T *dx, const float *gamma, const float *mean, const float *rstd,
                     float *dgamma, float *dbeta, Shape s) {
  const int64_t width = s.c / s.groups;
  Floats sum(s.c), dot(s.c), ka(s.c), kb(s.c), kc(s.c);
  for (int64_t i = 0; i < s.n; i++, x += s.p * s.c, dy += s.p * s.c, dx += s.p * s.c, mean += s.groups, rstd += s.groups) {
    std::fill(sum.begin(), sum.end(), 0.f);
    std::fill(dot.begin(), dot.end(), 0.f);
    float *a = sum.data(), *b = dot.data();
    for (int64_t p = 0; p < s.p; p++)
      for (int64_t c = 0; c < s.c; c++) { float d = get(dy + p * s.c + c); a[c] += d; b[c] += d * get(x + p * s.c + c); }
    for (int64_t g = 0; g < s.groups; g++) {
      const float m = mean[g], r = rstd[g];
      double dxhat = 0, plain = 0, count = double(s.p) * width;
      for (int64_t c = g * width; c < (g + 1) * width; c++) {
        dgamma[c] += (b[c] - m * a[c]) * r; dbeta[c] += a[c];
        dxhat += b[c] * gamma[c]; plain += a[c] * gamma[c];
      }
      const float slope = float((plain * m - dxhat) * r * r * r / count);
      const float offset = float(-slope * m - plain * r / count);
      for (int64_t c = g * width; c < (g + 1) * width; c++) { ka[c] = gamma[c] * r; kb[c] = slope; kc[c] = offset; }
    }
    const float *u = ka.data(), *v = kb.data(), *w = kc.data();
    for (int64_t p = 0; p < s.p; p++)
      for (int64_t c = 0; c < s.c; c++)
        put(dx + p * s.c + c, get(dy + p * s.c + c) * u[c] + get(x + p * s.c + c) * v[c] + w[c]);
  }
}

static Shape shape_of(const torch::Tensor &x, int64_t groups) {
  return {x.size(0), x.size(2) * x.size(3), x.size(1), groups};
}

std::vector<torch::Tensor> group_norm_forward(torch::Tensor x, torch::Tensor gamma, torch::Tensor beta, int64_t groups, double eps) {
  auto y = torch::empty_like(x);
  auto stats = torch::empty({2, x.size(0), groups}, torch::kFloat);
  float *mean = stats.data_ptr<float>(), *rstd = mean + x.size(0) * groups;
  const float *g = gamma.data_ptr<float>(), *b = beta.data_ptr<float>();
  if (x.scalar_type() == torch::kBFloat16)
    forward((const uint16_t *)x.data_ptr(), (uint16_t *)y.data_ptr(), g, b, mean, rstd, shape_of(x, groups), eps);
  else
    forward(x.data_ptr<float>(), y.data_ptr<float>(), g, b, mean, rstd, shape_of(x, groups), eps);
  return {y, stats};
}

std::vector<torch::Tensor> group_norm_backward(torch::Tensor x, torch::Tensor dy, torch::Tensor gamma, torch::Tensor stats, int64_t groups) {
  auto dx = torch::empty_like(x);
  auto dgamma = torch::zeros_like(gamma), dbeta = torch::zeros_like(gamma);
  const float *mean = stats.data_ptr<float>(), *rstd = mean + x.size(0) * groups, *g = gamma.data_ptr<float>();
  float *dg = dgamma.data_ptr<float>(), *db = dbeta.data_ptr<float>();
  if (x.scalar_type() == torch::kBFloat16)
    backward((const uint16_t *)x.data_ptr(), (const uint16_t *)dy.data_ptr(), (uint16_t *)dx.data_ptr(), g, mean, rstd, dg, db, shape_of(x, groups));
  else
    backward(x.data_ptr<float>(), dy.data_ptr<float>(), dx.data_ptr<float>(), g, mean, rstd, dg, db, shape_of(x, groups));
  return {dx, dgamma, dbeta};
}
