// The parts of a layer between its matrix products, each in one pass over memory: float32, forward and backward.
//
// Composed of torch's operations they are bound by memory: RMSNorm alone reads and writes its rows five times. Every
// function works on rows whose last stride is 1. Gradients of weights that all rows share are summed by each thread
// into a row of its own of `partial`, zeroed by the caller.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vector.h"

namespace {



// Parts of a vector at the end of a row; what is missing reads as `rest`.
inline vec get(const float* p, int64_t n, float rest = 0.f) {
  if (n >= VL) return load(p);
  float buffer[VL];
  for (int i = 0; i < VL; i++) buffer[i] = i < n ? p[i] : rest;
  return load(buffer);
}
inline void put(float* p, vec x, int64_t n) {
  if (n >= VL) return store(p, x);
  float buffer[VL];
  store(buffer, x);
  memcpy(p, buffer, n * sizeof(float));
}
inline float total(vec x) {
  float sum = 0.f;
  for (int i = 0; i < VL; i++) sum += x[i];
  return sum;
}

// e^x to 2 units in the last place, by the range reduction and polynomial of Cephes' expf; NaN stays NaN. What would be
// denormal is zero: matrix products slow down a hundredfold on denormals. Above the range it is the largest number.
inline vec exponential(vec x) {
  const vec low = vec{} - 87.33654f, high = vec{} + 88.37626f, magic = vec{} + 12582912.f;  // 1.5 * 2^23
  const ivec tiny = x < low;
  x = tiny ? low : x;
  x = x > high ? high : x;
  const vec shifted = x * 1.44269504088896341f + magic;
  const vec n = shifted - magic;
  const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return tiny ? vec{} : p * (vec)(((ivec)shifted - (ivec)magic + 127) << 23);
}
inline vec sigmoid(vec x) { return 1.f / (1.f + exponential(-x)); }

struct Norm {  // mirrored in kernels/fused.py, as are the other structures
  const float *x, *residual;  // the input is x + alpha * residual, written to `sum`; without a residual it is x
  float alpha;
  const float *weight, *gate;  // y = sigmoid(gate) * norm * weight; a null gate is none
  float epsilon;
  float *sum, *y, *scale;  // scale[row] = 1 / sqrt(mean(input^2) + epsilon)
  const float* grad_y;
  float *grad_x, *grad_gate, *partial;
  int64_t rows, width, threads;
};

void norm_row(const Norm& c, int64_t row) {
  const int64_t at = row * c.width;
  const float* in = c.x + at;
  vec squares{};
  for (int64_t j = 0; j < c.width; j += VL) {
    const int64_t n = c.width - j;
    vec x = get(in + j, n);
    if (c.residual) {
      x += c.alpha * get(c.residual + at + j, n);
      put(c.sum + at + j, x, n);
    }
    squares += x * x;
  }
  if (c.residual) in = c.sum + at;
  const float scale = 1.f / std::sqrt(total(squares) / float(c.width) + c.epsilon);
  c.scale[row] = scale;
  for (int64_t j = 0; j < c.width; j += VL) {
    const int64_t n = c.width - j;
    vec y = get(in + j, n) * scale * get(c.weight + j, n);
    if (c.gate) y *= sigmoid(get(c.gate + at + j, n));
    put(c.y + at + j, y, n);
  }
}

// With u = input * scale and g = grad_y * gate * weight:  grad = scale (g - u mean(g u)).
void norm_row_backward(const Norm& c, int64_t row, float* grad_weight) {
  const int64_t at = row * c.width;
  const float *in = (c.residual ? c.sum : c.x) + at, scale = c.scale[row];
  vec dot{};
  for (int64_t j = 0; j < c.width; j += VL) {
    const int64_t n = c.width - j;
    const vec u = get(in + j, n) * scale, w = get(c.weight + j, n);
    vec g = get(c.grad_y + at + j, n);
    if (c.gate) {
      const vec s = sigmoid(get(c.gate + at + j, n));
      put(c.grad_gate + at + j, g * u * w * s * (1.f - s), n);
      g *= s;
    }
    put(grad_weight + j, get(grad_weight + j, n) + g * u, n);
    g *= w;
    put(c.grad_x + at + j, g, n);
    dot += g * u;
  }
  const float mean = total(dot) / float(c.width);
  for (int64_t j = 0; j < c.width; j += VL) {
    const int64_t n = c.width - j;
    const vec u = get(in + j, n) * scale, g = get(c.grad_x + at + j, n);
    put(c.grad_x + at + j, scale * (g - u * mean), n);
  }
}

struct SwiGLU {
  const float *x, *probability;  // x: rows of gate and up, each `width` wide; y = silu(gate) * up * probability[row]
  float* y;                      // backward: written too, to be multiplied with the next layer's gradient
  const float* grad_y;
  float *grad_x, *grad_probability;
  int64_t rows, width, threads;
};

void swiglu_row(const SwiGLU& c, int64_t row) {
  const float *gate = c.x + 2 * row * c.width, *up = gate + c.width, p = c.probability[row];
  for (int64_t j = 0; j < c.width; j += VL) {
    const int64_t n = c.width - j;
    const vec a = get(gate + j, n);
    put(c.y + row * c.width + j, a * sigmoid(a) * get(up + j, n) * p, n);
  }
}

void swiglu_row_backward(const SwiGLU& c, int64_t row) {
  const float *gate = c.x + 2 * row * c.width, *up = gate + c.width, p = c.probability[row];
  float *grad_gate = c.grad_x + 2 * row * c.width, *grad_up = grad_gate + c.width;
  vec dot{};
  for (int64_t j = 0; j < c.width; j += VL) {
    const int64_t n = c.width - j, at = row * c.width + j;
    const vec a = get(gate + j, n), b = get(up + j, n), s = sigmoid(a), g = get(c.grad_y + at, n);
    const vec silu = a * s, mixed = silu * b;
    put(c.y + at, mixed * p, n);
    dot += g * mixed;
    put(grad_gate + j, g * p * b * (s + silu * (1.f - s)), n);
    put(grad_up + j, g * p * silu, n);
  }
  c.grad_probability[row] = total(dot);
}

struct CrossEntropy {
  const float* logits;
  const int64_t* labels;
  float *logprobs, *normaliser;  // normaliser[row]: its largest logit, log sum exp of its logits less that one
  const float* grad;       // of the log-probabilities
  float* grad_logits;
  int64_t rows, width, threads;
};

void cross_entropy_row(const CrossEntropy& c, int64_t row) {
  const float* x = c.logits + row * c.width;
  vec largest = vec{} - INFINITY;
  for (int64_t j = 0; j < c.width; j += VL) {
    const vec v = get(x + j, c.width - j, -INFINITY);
    largest = v > largest ? v : largest;
  }
  float most = -INFINITY;
  for (int i = 0; i < VL; i++) most = std::max(most, largest[i]);
  vec sum{};
  for (int64_t j = 0; j < c.width; j += VL) {
    const int64_t n = c.width - j;
    vec e = exponential(get(x + j, n) - most);
    for (int i = int(n); i < VL; i++) e[i] = 0.f;
    sum += e;
  }
  c.normaliser[2 * row] = most;
  c.normaliser[2 * row + 1] = std::log(total(sum));
  c.logprobs[row] = x[c.labels[row]] - most - c.normaliser[2 * row + 1];
}

void cross_entropy_row_backward(const CrossEntropy& c, int64_t row) {
  const float *x = c.logits + row * c.width, grad = c.grad[row];
  const float most = c.normaliser[2 * row], log_sum = c.normaliser[2 * row + 1];
  float* out = c.grad_logits + row * c.width;
  for (int64_t j = 0; j < c.width; j += VL) {
    const int64_t n = c.width - j;
    put(out + j, -grad * exponential(get(x + j, n) - most - log_sum), n);
  }
  out[c.labels[row]] += grad;
}

template <typename Call, typename Function>
void each_row(const Call& c, Function function) {
#pragma omp parallel for schedule(static) num_threads(int(c.threads)) if (c.threads > 1)
  for (int64_t row = 0; row < c.rows; row++) function(row);
}

}  // namespace

extern "C" {

void norm_forward(const Norm* c) {
  each_row(*c, [c](int64_t row) { norm_row(*c, row); });
}

void norm_backward(const Norm* c) {
#pragma omp parallel for schedule(static) num_threads(int(c->threads)) if (c->threads > 1)
  for (int64_t part = 0; part < c->threads; part++)
    for (int64_t row = c->rows * part / c->threads; row < c->rows * (part + 1) / c->threads; row++)
      norm_row_backward(*c, row, c->partial + part * c->width);
}

void swiglu_forward(const SwiGLU* c) {
  each_row(*c, [c](int64_t row) { swiglu_row(*c, row); });
}

void swiglu_backward(const SwiGLU* c) {
  each_row(*c, [c](int64_t row) { swiglu_row_backward(*c, row); });
}

void cross_entropy_forward(const CrossEntropy* c) {
  each_row(*c, [c](int64_t row) { cross_entropy_row(*c, row); });
}

void cross_entropy_backward(const CrossEntropy* c) {
  each_row(*c, [c](int64_t row) { cross_entropy_row_backward(*c, row); });
}

}  // extern "C"
