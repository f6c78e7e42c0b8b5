// The arguments of the mixer's operators, and what is kept between forward and backward.
#pragma once
#include "scan_tensors.h"

namespace mmvim {
namespace {

// Tokens at a time, about: enough for matrix products at full speed, few enough for the cache.
constexpr int64_t kTokens = 1024;

// What is stored for backward.
enum Save { kNothing = 0, kProjection = 1, kStatesOnly = 2 };

// Tokens [begin, end) of the sequence.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
  Tensor of(const Tensor& x) const { return x.slice(1, begin, end); }
};

// The parameters of one direction, then their gradients.
struct Branch {
  Tensor conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D;
  bool reverse = false, conv_reverse = false;

  int64_t taps() const { return conv_weight.size(-1); }
  int64_t rank() const { return dt_proj.size(1); }
  int64_t states() const { return A.size(1); }
  int64_t selects() const { return rank() + 2 * states(); }
  Branch zeros() const {
    auto zero = [](const Tensor& x) { return x.defined() ? at::zeros_like(x) : x; };
    return {zero(conv_weight), zero(conv_bias), zero(x_proj), zero(dt_proj), zero(dt_bias), zero(A),
            zero(D)};
  }
  // What the convolution sees of a sequence to compute these tokens: some more.
  Range seen(Range here, int64_t length) const {
    if (conv_reverse) return {here.begin, std::min(here.end + taps() - 1, length)};
    return {std::max<int64_t>(here.begin - taps() + 1, 0), here.end};
  }
  // The scan's arguments from (b, l, E) u and delta and (b, l, R + 2 N) selected.
  Direction direction(const Tensor& u, const Tensor& delta, const Tensor& selected) const {
    auto part = [&](int64_t i) {
      int64_t begin = rank() + i * states();
      return selected.slice(2, begin, begin + states()).transpose(1, 2);        // (b, N, l)
    };
    auto given = [](const Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; };
    return Direction(u.transpose(1, 2), delta.transpose(1, 2), A, part(0), part(1), given(D),
                     given(dt_bias), true, reverse);
  }
};

struct Mixer {
  Tensor tokens, norm_weight, in_weight, in_bias, out_weight, out_bias;
  std::vector<Branch> branches;               // in the order in which `out` is added up
  double scale, norm_eps;
  int64_t batch, length, inner, together;     // images that are worked through together
  std::vector<Range> stretches;

  Mixer(const Tensor& tokens_, const OptionalTensor& norm_weight, const Tensor& in_weight,
        const OptionalTensor& in_bias, const Tensor& out_weight, const OptionalTensor& out_bias,
        std::vector<Branch> branches_, double scale, double norm_eps)
      : tokens(tokens_.contiguous()), norm_weight(packed(norm_weight.value_or(Tensor()))),
        in_weight(in_weight), in_bias(packed(in_bias.value_or(Tensor()))), out_weight(out_weight),
        out_bias(packed(out_bias.value_or(Tensor()))), branches(std::move(branches_)), scale(scale),
        norm_eps(norm_eps), batch(tokens_.size(0)),
        length(tokens_.size(1)), inner(in_weight.size(0) / 2) {
    std::reverse(branches.begin(), branches.end());
    together = kTokens / std::max<int64_t>(length, 1);
    together = std::clamp<int64_t>(together, 1, std::max<int64_t>(batch, 1));
    int64_t count = count_stretches(length);
    for (int64_t i = 0; i < count; i++)
      stretches.push_back({length * i / count, length * (i + 1) / count});
  }

  // Rows of inner * states numbers that are saved of one image and direction: for each stretch the
  // state it starts in and its checkpoints, as many as the longest stretch has.
  static int64_t rows(int64_t length) {
    int64_t stretches = count_stretches(length);
    return stretches * (1 + checkpoints((length + stretches - 1) / stretches));
  }
  static int64_t count_stretches(int64_t length) {
    return std::max<int64_t>(1, (length + kTokens / 2) / kTokens);
  }
  static int64_t checkpoints(int64_t length) { return std::max<int64_t>(length - 1, 0) / kSegment; }
  int64_t longest() const {
    return (length + int64_t(stretches.size()) - 1) / int64_t(stretches.size());
  }

  // Where a stretch of these images starts, (b, E, N), and its checkpoints, (b, saved, N, E).
  std::pair<Tensor, Tensor> states(const Tensor& all, const Branch& p, int64_t first, int64_t b,
                                   size_t stretch) const {
    int64_t per_stretch = rows(length) / int64_t(stretches.size());
    int64_t begin = first * rows(length) + b * int64_t(stretch) * per_stretch;
    int64_t count = checkpoints(stretches[stretch].size());
    return {all.slice(0, begin, begin + b).view({b, inner, p.states()}),
            all.slice(0, begin + b, begin + b + b * count).view({b, count, p.states(), inner})};
  }

  // Stretches in the order of a scan, or against it.
  std::vector<size_t> order(const Branch& p, bool backward) const {
    std::vector<size_t> indices(stretches.size());
    std::iota(indices.begin(), indices.end(), 0);
    if (p.reverse != backward) std::reverse(indices.begin(), indices.end());
    return indices;
  }

  Finish finish(size_t branch) const {
    return branches.size() == 1 ? Finish::kGate : branch == 0 ? Finish::kKeep : Finish::kAddAndGate;
  }
};

}  // namespace
}  // namespace mmvim
