// The mixer, forward: all images and stretches are one list of steps, so that threads meet at the end
// of each, and nothing else lies between the kernels.
#pragma once
#include "conv_tensors.h"
#include "mixer.h"
#include "product_tensors.h"
#include "steps.h"

namespace mmvim {
namespace {

template <class T> class MixerForward {
 public:
  // `out` is (batch, length, C'). `xz` is in_proj's output, (batch, length, 2 E), where it is to be
  // saved; `saved` are the states of each branch, in the order of `branches`. Else they are empty.
  // Tokens and `out` may be of a half precision. With bfloat16 results products are of bfloat16
  // numbers where the processor gains by it; all that lies between them is float32.
  MixerForward(const Mixer& m, const Tensor& out, const Tensor& xz,
               const std::vector<Tensor>& saved)
      : m(m), out(out), xz(xz), saved(saved) {
    if (out.scalar_type() == at::kBFloat16) half = half_kernels();
  }

  void run() {
    const int64_t rows = m.together * m.longest();
    const int64_t more = m.stretches.size() > 1 ? kMostTaps - 1 : 0;   // see Branch::seen
    if (m.norm_weight.defined()) normed = room(rows, m.tokens.size(2));
    if (m.tokens.scalar_type() != kType) wide_tokens = room(rows, m.tokens.size(2));
    if (out.scalar_type() != kType) wide_out = room(rows, out.size(2));
    if (half) halves = room(rows, (std::max(m.tokens.size(2), m.inner) + 1) / 2);
    y = empty({m.together, m.length, m.inner});
    u = room(rows + more, m.inner);
    delta = room(rows, m.inner);
    if (keeps_projection()) {
      if (xz.numel() == 0) xz_memory = empty({m.together, m.length, 2 * m.inner});
    } else {
      x = empty({1, m.length, m.inner});
      z = room(rows, m.inner);
    }
    int64_t selects = 0;
    for (const Branch& p : m.branches) selects = std::max(selects, p.selects());
    selected = room(rows, selects);
    for (int64_t first = 0; first < m.batch; first += m.together)
      add_images(first, std::min(m.together, m.batch - first));
    steps.run();
  }

 private:
  static constexpr at::ScalarType kType = c10::CppTypeToScalarType<T>::value;

  const Mixer& m;
  const Tensor out, xz;
  const std::vector<Tensor>& saved;
  const HalfKernels* half = nullptr;
  Tensor normed, x, z, xz_memory, y, u, delta, selected, wide_tokens, wide_out, halves;
  std::vector<Tensor> alive;                  // what the steps point to besides
  Steps steps;

  Tensor empty(at::IntArrayRef size) const { return fresh(size, options()); }
  at::TensorOptions options() const { return m.tokens.options().dtype(kType); }
  Tensor room(int64_t rows, int64_t columns) const { return empty({rows * columns}); }
  static Tensor shaped(const Tensor& room, int64_t b, int64_t l, int64_t columns) {
    return room.slice(0, 0, b * l * columns).view({b, l, columns});
  }

  // Both halves of in_proj's output at once, for whole sequences. Else x is kept for whole
  // sequences, and z is computed where it is needed.
  bool keeps_projection() const { return xz.numel() > 0 || m.stretches.size() == 1; }

  void add_images(int64_t first, int64_t b) {
    auto some = [&](const Tensor& all) { return all.slice(0, first, first + b); };
    Tensor images = some(m.tokens), out_here = some(out), x_here, z_here;
    if (keeps_projection()) {
      Tensor both = xz.numel() > 0 ? some(xz) : xz_memory.slice(0, 0, b);
      for (Range here : m.stretches) project(here.of(images), 0, 2 * m.inner, here.of(both));
      x_here = both.slice(2, 0, m.inner), z_here = both.slice(2, m.inner);
    } else {
      for (Range here : m.stretches) project(here.of(images), 0, m.inner, here.of(x));
      x_here = x;
    }
    for (size_t i = 0; i < m.branches.size(); i++) {
      const Branch& p = m.branches[i];
      Tensor state = at::zeros({b, m.inner, p.states()}, options());
      alive.push_back(state);
      for (size_t s : m.order(p, false)) {
        Range here = m.stretches[s];
        Tensor checkpoints;
        if (saved[i].numel() > 0) {
          auto kept = m.states(saved[i], p, first, b, s);
          copy(state, kept.first);
          checkpoints = kept.second;
        }
        bool last = i + 1 == m.branches.size();
        Tensor z_of_stretch;
        if (last && z_here.defined()) {
          z_of_stretch = here.of(z_here);
        } else if (last) {
          z_of_stretch = shaped(z, b, here.size(), m.inner);
          project(here.of(images), m.inner, 2 * m.inner, z_of_stretch);
        }
        Tensor y_here = here.of(y.slice(0, 0, b));
        branch(i, here, x_here, z_of_stretch, y_here, state, checkpoints);
        if (last) finish(y_here, here.of(out_here));
      }
    }
  }

  // One direction of one stretch: y is written, or added to and gated where there is a z.
  void branch(size_t i, Range here, const Tensor& x, const Tensor& z, const Tensor& y,
              const Tensor& state, const Tensor& checkpoints) {
    const Branch& p = m.branches[i];
    const int64_t b = y.size(0), l = here.size(), begin = p.seen(here, m.length).begin;
    Tensor x_seen = p.seen(here, m.length).of(x);
    Tensor u_seen = shaped(u, b, x_seen.size(1), m.inner);
    Tensor u_here = u_seen.slice(1, here.begin - begin, here.begin - begin + l);
    Tensor delta_here = shaped(delta, b, l, m.inner);
    Tensor selected_here = shaped(selected, b, l, p.selects());

    auto conv = conv_args<T>(x_seen.transpose(1, 2), p.conv_weight, p.conv_bias, true,
                             p.conv_reverse);
    conv.out = sequence<T>(u_seen.transpose(1, 2), p.conv_reverse);
    steps.add(conv.batch * conv.splits, [conv](int64_t task) {
      kernels<T>().conv_forward(conv, task, task + 1);
    });

    product(u_here, p.x_proj, {}, selected_here);

    Direction d = p.direction(u_here, delta_here, selected_here);
    auto scan = d.args<T>(z.defined() ? z.transpose(1, 2) : z, z.defined() ? m.scale : 1.,
                          m.finish(i));
    scan.out = sequence<T>(y.transpose(1, 2), p.reverse);
    scan.first_state = data<const T>(state), scan.last_state = data<T>(state);
    scan.checkpoints = data<T>(checkpoints);
    Tensor dt = rows_of(selected_here).slice(1, 0, p.rank());
    auto step_size = product_args<T>(dt, p.dt_proj, {}, rows_of(delta_here));
    steps.add(scan.batch * scan.splits, [scan, step_size](int64_t task) {
      auto own = channels_of(scan, step_size, task);
      run_product(own, 0, product_tasks(own));
      const Kernels<T>& table = kernels<T>();
      table.scan_forward(scan, task, task + 1, scratch(table.scan_scratch(scan, false)));
    });
  }

  // The step sizes of the image and the channels that a task of the scan has.
  static ProductArgs<T> channels_of(const ScanArgs<T>& scan, ProductArgs<T> all, int64_t task) {
    int64_t lanes = kernels<T>().lanes, blocks = (scan.channels + lanes - 1) / lanes;
    int64_t image = task / scan.splits, split = task % scan.splits;
    int64_t first = split * blocks / scan.splits * lanes;
    int64_t last = std::min((split + 1) * blocks / scan.splits * lanes, scan.channels);
    all.rows = scan.length, all.out = last - first, all.chunks = 1;
    all.x += image * scan.length * all.x_row;
    all.weight += first * all.weight_out;
    all.y += image * scan.length * all.y_row + first;
    return all;
  }

  // Rows [begin, end) of in_proj, of tokens before their norm.
  void project(const Tensor& images, int64_t begin, int64_t end, const Tensor& to) {
    Tensor rows = images;
    if (wide_tokens.defined()) {
      rows = shaped(wide_tokens, images.size(0), images.size(1), images.size(2));
      convert(images, rows);
    }
    if (m.norm_weight.defined()) {
      Tensor x = rows;
      rows = shaped(normed, images.size(0), images.size(1), images.size(2));
      NormArgs<T> args{images.size(2), data<const T>(x), data<const T>(m.norm_weight),
                       T(m.norm_eps), data<T>(rows)};
      by_rows(images.size(0) * images.size(1), [args](int64_t begin, int64_t end) {
        kernels<T>().norm(args, begin, end);
      });
    }
    Tensor bias = m.in_bias.defined() ? m.in_bias.slice(0, begin, end) : m.in_bias;
    product(rows, m.in_weight.slice(0, begin, end), bias, to);
  }

  // out_proj of gated y.
  void finish(const Tensor& y, const Tensor& to) {
    if (!wide_out.defined()) return product(y, m.out_weight, m.out_bias, to);
    Tensor wide = shaped(wide_out, to.size(0), to.size(1), to.size(2));
    product(y, m.out_weight, m.out_bias, wide);
    convert(wide, to);
  }

  void product(const Tensor& from, const Tensor& weight, const Tensor& bias, const Tensor& to) {
    auto args = product_args<T>(rows_of(from), weight, bias, rows_of(to));
    if constexpr (std::is_same_v<T, float>)
      if (half && args.in % 2 == 0) return product_of_pairs(args);
    steps.add(product_tasks(args), [args](int64_t task) { run_product(args, task, task + 1); });
  }

  void product_of_pairs(const ProductArgs<float>& all) {
    ProductArgs<float> args = all;
    float* pairs = data<float>(halves);
    args.in /= 2, args.x = pairs, args.x_row = args.in, args.weight_in = 2;
    const HalfKernels* table = half;
    by_rows(args.rows, [=](int64_t begin, int64_t end) {
      table->round(all.x + begin * all.x_row, all.x_row, end - begin, all.in,
                   pairs + begin * args.x_row);
    });
    steps.add(product_tasks(args), [=](int64_t task) {
      table->product(args, task, task + 1, scratch(table->scratch(args.in)));
    });
  }

  // A step of many rows that need each other for nothing.
  template <class Work> void by_rows(int64_t count, Work work) {
    constexpr int64_t kRows = 16;
    steps.add((count + kRows - 1) / kRows, [=](int64_t task) {
      work(task * kRows, std::min((task + 1) * kRows, count));
    });
  }

  // From and to a half precision.
  void convert(const Tensor& from, const Tensor& to) {
    auto type = from.scalar_type() == kType ? to.scalar_type() : from.scalar_type();
    auto with_half = [&](auto zero) {
      using Half = decltype(zero);
      if (from.scalar_type() == kType) convert_as<T, Half>(from, to);
      else convert_as<Half, T>(from, to);
    };
    if (type == at::kBFloat16) with_half(c10::BFloat16());
    else with_half(c10::Half());
  }
  template <class From, class To> void convert_as(const Tensor& from, const Tensor& to) {
    const From* source = data<const From>(from);
    To* target = data<To>(to);
    int64_t columns = from.size(2);
    by_rows(from.size(0) * from.size(1), [=](int64_t begin, int64_t end) {
      for (int64_t i = begin * columns; i < end * columns; i++)
        target[i] = static_cast<To>(static_cast<float>(source[i]));
    });
  }

  void copy(const Tensor& from, const Tensor& to) {
    auto *source = data<const T>(from), *target = data<T>(to);
    int64_t count = from.numel();
    steps.add(1, [=](int64_t) { std::copy_n(source, count, target); });
  }
};

}  // namespace
}  // namespace mmvim
