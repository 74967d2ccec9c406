// The kernels of csrc/cuda/inverted_residual.cuh against plain loops.
#include "sanitized.h"

#include "cuda/inverted_residual.cuh"

float relu6(float v) { return std::min(std::max(v, 0.0f), 6.0f); }

// Of integers all sums are exact, and relu6 keeps what is rounded in between small.
template <class T>
struct Problem {
  InvertedResidualShape s;
  Buffer<T> x, expand_weight, dw_weight, project_weight, residual;
  Buffer<float> expand_bias, dw_bias, project_bias;

  Problem(const InvertedResidualShape& s)
      : s(s),
        x(integers<T>(s.batch * s.height * s.width * s.channels)),
        expand_weight(integers<T>(s.expands ? s.expanded * s.channels : 0)),
        dw_weight(integers<T>(s.expanded * s.taps())),
        project_weight(integers<T>(s.out_channels * s.expanded)),
        residual(integers<T>(outputs())),
        expand_bias(integers<float>(s.expanded)),
        dw_bias(integers<float>(s.expanded)),
        project_bias(integers<float>(s.out_channels)) {}

  int64_t outputs() const { return s.batch * s.out_height * s.out_width * s.out_channels; }

  InvertedResidualArguments<T> arguments() const {
    InvertedResidualArguments<T> a;
    a.x = x.get();
    a.expand_weight = s.expands ? expand_weight.get() : nullptr;
    a.expand_bias = {expand_bias.get(), true, 1, 0};
    a.dw_weight = dw_weight.get();
    a.dw_bias = {dw_bias.get(), true, 1, 0};
    a.project_weight = project_weight.get();
    a.project_bias = {project_bias.get(), true, 1, 0};
    a.residual = residual.get();
    a.shape = s;
    a.activation = kRelu6;
    return a;
  }

  Buffer<T> by_kernel() const {
    Buffer<T> y(outputs());
    InvertedResidualArguments<T> a = arguments();
    a.y = y.get();
    inverted_residual_forward<T, false>(a, nullptr);
    return y;
  }

  // d, and its sums over an image's pixels.
  std::pair<Buffer<T>, Buffer<float>> by_squeeze() const {
    Buffer<T> d(s.batch * s.out_height * s.out_width * s.expanded);
    InvertedResidualArguments<T> a = arguments();
    a.d = d.get();
    const InvertedResidualPlan p = make_plan<T>(squeeze_shape(s));
    const Buffer<float> partial(s.batch * p.tiles_h * p.tiles_w * s.expanded);
    a.partial = partial.get();
    inverted_residual_squeeze<T, false>(a, nullptr);
    Buffer<float> sums(s.expanded);
    for (int c = 0; c < s.expanded; ++c) {
      sums.get()[c] = 0;
      for (int64_t i = c; i < partial.count; i += s.expanded) sums.get()[c] += partial.get()[i];
    }
    return {std::move(d), std::move(sums)};
  }

  float expanded_at(int64_t pixel, int channel) const {
    if (!s.expands) return widen(x.get()[pixel * s.channels + channel]);
    float sum = expand_bias.get()[channel];
    for (int c = 0; c < s.channels; ++c)
      sum += widen(x.get()[pixel * s.channels + c]) * widen(expand_weight.get()[channel * s.channels + c]);
    return relu6(sum);
  }

  Buffer<T> d_by_loops() const {
    std::vector<float> e(s.batch * s.height * s.width * s.expanded);
    for (size_t i = 0; i < e.size(); ++i) e[i] = expanded_at(i / s.expanded, static_cast<int>(i % s.expanded));
    Buffer<T> d(s.batch * s.out_height * s.out_width * s.expanded);
    for (int64_t i = 0; i < d.count; ++i) {
      const int64_t pixel = i / s.expanded, column = pixel % s.out_width, row = pixel / s.out_width % s.out_height;
      const int64_t image = pixel / s.out_width / s.out_height, c = i % s.expanded;
      float sum = dw_bias.get()[c];
      for (int tap = 0; tap < s.taps(); ++tap) {
        const int64_t in_row = row * s.stride_h - s.pad_top + tap / s.kernel_w * s.dilation_h;
        const int64_t in_column = column * s.stride_w - s.pad_left + tap % s.kernel_w * s.dilation_w;
        if (in_row < 0 || in_row >= s.height || in_column < 0 || in_column >= s.width) continue;
        sum += e[((image * s.height + in_row) * s.width + in_column) * s.expanded + c] *
               widen(dw_weight.get()[c * s.taps() + tap]);
      }
      d.get()[i] = narrow<T>(relu6(sum));
    }
    return d;
  }

  Buffer<T> y_by_loops(const Buffer<T>& d) const {
    Buffer<T> y(outputs());
    for (int64_t i = 0; i < y.count; ++i) {
      const int64_t pixel = i / s.out_channels, k = i % s.out_channels;
      float sum = project_bias.get()[k] + widen(residual.get()[i]);
      for (int c = 0; c < s.expanded; ++c)
        sum += widen(d.get()[pixel * s.expanded + c]) * widen(project_weight.get()[k * s.expanded + c]);
      y.get()[i] = narrow<T>(sum);
    }
    return y;
  }
};

template <class T>
bool check(int channels, int expanded, int out_channels, int height, int width, int k, int stride, int dilation = 1) {
  const Axis vertical = output_axis(height, k, stride, dilation, nullptr);
  const Axis horizontal = output_axis(width, k, stride, dilation, nullptr);
  const Problem<T> problem(InvertedResidualShape{1, channels, expanded ? expanded : channels, out_channels, height,
                                                 width, vertical.out, horizontal.out, k, k, stride, stride,
                                                 vertical.before, horizontal.before, dilation, dilation, expanded > 0});
  const Buffer<T> d = problem.d_by_loops();
  Buffer<float> sums(problem.s.expanded);
  for (int64_t c = 0; c < sums.count; ++c) {
    sums.get()[c] = 0;
    for (int64_t i = c; i < d.count; i += sums.count) sums.get()[c] += widen(d.get()[i]);
  }
  const auto squeezed = problem.by_squeeze();
  return equal("y", problem.by_kernel(), problem.y_by_loops(d)) && equal("d", squeezed.first, d) &&
         equal("sums of d", squeezed.second, sums);
}

// With squeeze-excite: y of several launches, and of one on clusters of 2 blocks, which have 2 chunks and 1.
template <class T>
bool check_one_pass(int channels, int out_channels, int height, int width, int k, int stride) {
  constexpr int kExpanded = 2 * kChunk<T> + kVec<T>, kSqueezed = 3;
  const Axis vertical = output_axis(height, k, stride, 1, nullptr);
  const Axis horizontal = output_axis(width, k, stride, 1, nullptr);
  const Problem<T> problem(InvertedResidualShape{1, channels ? channels : kExpanded, kExpanded, out_channels, height,
                                                 width, vertical.out, horizontal.out, k, k, stride, stride,
                                                 vertical.before, horizontal.before, 1, 1, channels > 0});
  const InvertedResidualShape& s = problem.s;
  const Buffer<T> reduce = integers<T>(kSqueezed * kExpanded), expand = integers<T>(kExpanded * kSqueezed);
  const Buffer<T> d(s.batch * s.out_height * s.out_width * kExpanded), gates(s.batch * kExpanded);
  const Buffer<T> several(problem.outputs()), one(problem.outputs());
  InvertedResidualArguments<T> a = problem.arguments();
  ExciteArguments<T> excite;
  excite.squeezed = kSqueezed;
  excite.reduce_weight = reduce.get();
  excite.expand_weight = expand.get();
  excite.gate_activation = kSigmoid;
  a.y = one.get();
  inverted_residual_one_pass<T, false>(a, excite, nullptr);
  const Buffer<float> workspace(inverted_residual_workspace(s, excite));
  excite.workspace = workspace.get();
  excite.gates = gates.get();
  a.d = d.get();
  a.y = several.get();
  inverted_residual_excited<T, false>(a, excite, nullptr);
  return equal("y", one, several);
}

// Two chunks of expanded channels each: what is copied ahead for the second, and what the second overwrites.
template <class T>
bool check_all() {
  constexpr int two = 2 * kChunk<T>;
  return check<T>(8, two, 16, 5, 9, 3, 1) && check<T>(2 * kChunk<T>, 0, 68, 4, 4, 5, 2) &&
         check<T>(3, two - 5, 5, 3, 4, 2, 1, 2) && check_one_pass<T>(8, 40, 5, 9, 3, 1) &&
         check_one_pass<T>(0, 16, 6, 5, 5, 2);
}

SANITIZED_MAIN(check_all)
