// The CPU kernels against plain loops in double precision, on random arguments, without torch: for
// compilers and processors that torch is not at hand for. Prints a line per instruction set and
// type; the exit status is 1 if something differs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"

using namespace mmvim;

namespace {

std::mt19937 source;
bool coin() { return source() % 2; }
int64_t pick(std::vector<int64_t> of) { return of[source() % of.size()]; }

// (batch, channels, length) values in a layout of their own; `at` ignores the layout.
template <class T> struct Values {
  int64_t channels, length, batch_stride, channel_stride, time_stride;
  bool reverse;
  std::vector<T> memory;

  Values(int64_t batch, int64_t channels, int64_t length, bool channels_last, bool reverse)
      : channels(channels), length(length), reverse(reverse) {
    int64_t room = source() % 3;     // rows need not be next to each other
    channel_stride = channels_last ? 1 : length + room;
    time_stride = channels_last ? channels + room : 1;
    batch_stride = (channels + room) * (length + room);
    memory.assign(batch * batch_stride, T(-77));
  }
  T& at(int64_t b, int64_t c, int64_t t) {
    if (reverse) t = length - 1 - t;
    return memory[b * batch_stride + c * channel_stride + t * time_stride];
  }
  void fill(int64_t batch, double low, double high) {
    std::uniform_real_distribution<double> values(low, high);
    for (int64_t b = 0; b < batch; b++)
      for (int64_t c = 0; c < channels; c++)
        for (int64_t t = 0; t < length; t++) at(b, c, t) = T(values(source));
  }
  template <class X> operator Sequence<X>() {
    T* first = memory.data() + (reverse ? (length - 1) * time_stride : 0);
    return {first, batch_stride, channel_stride, reverse ? -time_stride : time_stride};
  }
};

template <class T> std::vector<T> numbers(int64_t count, double low, double high) {
  std::uniform_real_distribution<double> values(low, high);
  std::vector<T> x(count);
  for (T& value : x) value = T(values(source));
  return x;
}

// The largest difference of two tensors as a share of the largest element.
struct Comparison {
  double difference = 0, size = 1e-30;
  void add(double got, double expected) {
    double d = std::fabs(got - expected);
    if (!(d <= difference)) difference = d;     // NaN, too
    size = std::max(size, std::fabs(expected));
  }
  double share() const { return difference / size; }
};

struct Report {
  double limit, worst = 0;
  bool right = true;
  std::string of = {};
  void take(const char* name, const Comparison& c) {
    worst = std::max(worst, c.share());
    if (c.share() <= limit) return;
    right = false;
    std::printf("%s of %s differs by %g, allowed are %g\n", name, of.c_str(), c.share(), limit);
  }
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double softplus(double x) { return std::fmax(x, 0) + std::log1p(std::exp(-std::fabs(x))); }

template <class T> void check_scan(Report& report) {
  const int64_t batch = pick({1, 2}), groups = pick({1, 1, 2}), per_group = pick({1, 3, 16, 19});
  const int64_t channels = groups * per_group, length = pick({1, 7, 32, 161, 330});
  const int64_t states = pick({1, 3, 4, 8, 16, 17});
  const bool reverse = coin(), softplus_ = coin(), gated = coin(), has_D = coin();
  const bool has_bias = coin(), has_state = coin(), vary_B = coin(), vary_C = coin();
  const double strength = pick({1, 8, 300});     // the last one needs exponentials without bounds
  auto layout = [&] { return Values<T>(batch, channels, length, coin(), reverse); };
  auto u = layout(), delta = layout(), z = layout(), out = layout(), grad_out = layout();
  auto grad_u = layout(), grad_delta = layout(), grad_z = layout();
  for (auto* x : {&u, &z, &grad_out}) x->fill(batch, -1, 1);
  if (softplus_) delta.fill(batch, -4, 1); else delta.fill(batch, 0, 0.5);
  auto A = numbers<T>(channels * states, -strength, 0), D = numbers<T>(channels, -1, 1);
  auto bias = numbers<T>(channels, 0, 0.3);
  auto first = numbers<T>(batch * channels * states, -1, 1);
  auto grad_last = numbers<T>(batch * channels * states, -1, 1), last = first, grad_first = first;
  auto B = numbers<T>(vary_B ? batch * groups * length * states : channels * states, -1, 1);
  auto C = numbers<T>(vary_C ? batch * groups * length * states : channels * states, -1, 1);

  ScanArgs<T> args{};
  args.batch = batch, args.channels = channels, args.length = length, args.states = states;
  args.groups = groups, args.splits = pick({1, 2});
  args.u = u, args.delta = delta;
  if (gated) args.z = z;
  const bool states_last = coin();
  auto matrix = [&](const std::vector<T>& m, bool varying) -> Matrix<T> {
    if (!varying) return {m.data(), 0, 0, states, 1, 0, false};
    if (states_last)
      return {m.data(), groups * length * states, length * states, 0, 1, states, true};
    return {m.data(), groups * length * states, length * states, 0, length, 1, true};
  };
  args.B = matrix(B, vary_B), args.C = matrix(C, vary_C);
  auto element = [&](bool varying, int64_t b, int64_t c, int64_t n, int64_t t) {
    if (!varying) return c * states + n;
    int64_t start = (b * groups + c / per_group) * length * states;
    return start + (states_last ? t * states + n : n * length + t);
  };
  args.A = A.data(), args.D = has_D ? D.data() : nullptr;
  args.delta_bias = has_bias ? bias.data() : nullptr;
  args.softplus = softplus_, args.scale = T(0.75), args.finish = Finish::kGate;
  args.out = out;
  args.first_state = has_state ? first.data() : nullptr, args.last_state = last.data();
  std::vector<T> checkpoints(batch * ((length - 1) / kSegment) * states * channels);
  args.checkpoints = checkpoints.data();

  const Kernels<T>& table = kernels<T>();
  const int64_t blocks = (per_group + table.lanes - 1) / table.lanes;
  args.splits = std::min(args.splits, blocks);
  const int64_t tasks = batch * groups * args.splits;
  std::vector<char> memory(
      std::max(table.scan_scratch(args, false), table.scan_scratch(args, true)) + 64);
  char* room = memory.data() + 64 - reinterpret_cast<uintptr_t>(memory.data()) % 64;
  table.scan_forward(args, 0, tasks, room);

  std::vector<T> grad_A(batch * channels * states), grad_D(batch * channels), grad_bias(grad_D);
  auto of = [&](bool varying) {
    return std::vector<T>(varying ? tasks * length * states : batch * channels * states);
  };
  std::vector<T> grad_B = of(vary_B), grad_C = of(vary_C);
  args.out.data = nullptr;
  args.grad_out = grad_out, args.grad_last_state = grad_last.data();
  args.grad_first_state = grad_first.data();
  args.grad_u = grad_u, args.grad_delta = grad_delta;
  if (gated) args.grad_z = grad_z;
  args.grad_A = grad_A.data();
  if (has_D) args.grad_D = grad_D.data();
  if (has_bias) args.grad_delta_bias = grad_bias.data();
  args.grad_B = grad_B.data(), args.grad_C = grad_C.data(), args.grad_time = states;
  table.scan_backward(args, 0, tasks, room);

  // the same as loops; gradients of B and C in the kernels' layout
  std::vector<double> sum_B(vary_B ? batch * groups * length * states : grad_B.size());
  std::vector<double> sum_C(vary_C ? batch * groups * length * states : grad_C.size());
  Comparison y_, last_, u_, delta_, z_, A_, D_, bias_, B_, C_, first_;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t c = 0; c < channels; c++) {
      const int64_t row = b * channels + c;
      std::vector<double> y(length), step(length), slope(length, 1.), g(length);
      std::vector<double> du(length), dstep(length), h((length + 1) * states);
      double dD = 0, dbias = 0;
      for (int64_t n = 0; n < states && has_state; n++) h[n] = first[row * states + n];
      for (int64_t t = 0; t < length; t++) {
        double x = double(delta.at(b, c, t)) + (has_bias ? double(bias[c]) : 0.);
        step[t] = softplus_ ? softplus(x) : x;
        if (softplus_) slope[t] = sigmoid(x);
        y[t] = has_D ? double(D[c]) * u.at(b, c, t) : 0.;
        for (int64_t n = 0; n < states; n++) {
          double& now = h[(t + 1) * states + n];
          now = std::exp(step[t] * A[c * states + n]) * h[t * states + n]
              + step[t] * u.at(b, c, t) * B[element(vary_B, b, c, n, t)];
          y[t] += now * C[element(vary_C, b, c, n, t)];
        }
        double gate = z.at(b, c, t), s = sigmoid(gate), scale = args.scale;
        double factor = gated ? gate * s * scale : scale;
        y_.add(out.at(b, c, t), y[t] * factor);
        g[t] = grad_out.at(b, c, t) * factor;
        if (gated)
          z_.add(grad_z.at(b, c, t),
                 y[t] * grad_out.at(b, c, t) * scale * s * (1 + gate * (1 - s)));
      }
      for (int64_t n = 0; n < states; n++) {
        const double a = A[c * states + n];
        last_.add(last[row * states + n], h[length * states + n]);
        double X = grad_last[row * states + n], dA = 0;
        for (int64_t t = length - 1; t >= 0; t--) {
          const int64_t in_B = element(vary_B, b, c, n, t), in_C = element(vary_C, b, c, n, t);
          const int64_t sum = vary_B || vary_C
              ? ((b * groups + c / per_group) * length + t) * states + n : 0;
          double G = C[in_C] * g[t] + X, x = u.at(b, c, t);
          sum_C[vary_C ? sum : row * states + n] += h[(t + 1) * states + n] * g[t];
          sum_B[vary_B ? sum : row * states + n] += G * step[t] * x;
          du[t] += G * step[t] * B[in_B], dstep[t] += G * x * B[in_B];
          X = std::exp(step[t] * a) * G;
          dA += X * h[t * states + n] * step[t], dstep[t] += X * h[t * states + n] * a;
        }
        A_.add(grad_A[row * states + n], dA);
        first_.add(grad_first[row * states + n], X);
      }
      for (int64_t t = 0; t < length; t++) {
        u_.add(grad_u.at(b, c, t), du[t] + (has_D ? double(D[c]) * g[t] : 0.));
        delta_.add(grad_delta.at(b, c, t), dstep[t] * slope[t]);
        dbias += dstep[t] * slope[t], dD += g[t] * u.at(b, c, t);
      }
      if (has_D) D_.add(grad_D[row], dD);
      if (has_bias) bias_.add(grad_bias[row], dbias);
    }
  auto sums = [&](Comparison& c, std::vector<T>& got, const std::vector<double>& expected) {
    for (size_t i = 0; i < expected.size(); i++) {
      double all = 0;
      for (size_t j = i; j < got.size(); j += expected.size()) all += got[j];
      c.add(all, expected[i]);
    }
  };
  sums(B_, grad_B, sum_B), sums(C_, grad_C, sum_C);
  report.take("y", y_), report.take("last_state", last_), report.take("grad_u", u_);
  report.take("grad_delta", delta_), report.take("grad_z", z_), report.take("grad_A", A_);
  report.take("grad_D", D_), report.take("grad_delta_bias", bias_), report.take("grad_B", B_);
  report.take("grad_C", C_), report.take("grad_first_state", first_);
}

template <class T> void check_convolution(Report& report) {
  const int64_t batch = pick({1, 2}), channels = pick({1, 5, 16, 35}), taps = pick({1, 3, 4, 8});
  const int64_t length = pick({1, 2, 63, 64, 150});
  const bool reverse = coin(), silu = coin(), has_bias = coin();
  auto layout = [&] { return Values<T>(batch, channels, length, coin(), reverse); };
  auto x = layout(), out = layout(), grad_out = layout(), grad_x = layout();
  x.fill(batch, -2, 2), grad_out.fill(batch, -1, 1);
  auto weight = numbers<T>(channels * taps, -1, 1), bias = numbers<T>(channels, -1, 1);
  std::vector<T> grad_weight(batch * channels * taps), grad_bias(batch * channels);
  ConvArgs<T> args{};
  args.batch = batch, args.channels = channels, args.length = length, args.width = taps;
  args.splits = 1, args.x = x, args.weight = weight.data(), args.silu = silu, args.out = out;
  args.bias = has_bias ? bias.data() : nullptr;
  args.grad_out = grad_out, args.grad_x = grad_x, args.grad_weight = grad_weight.data();
  args.grad_bias = has_bias ? grad_bias.data() : nullptr;
  kernels<T>().conv_forward(args, 0, batch);
  kernels<T>().conv_backward(args, 0, batch);

  Comparison y_, x_, weight_, bias_;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t c = 0; c < channels; c++) {
      std::vector<double> dx(length), dw(taps);
      double db = 0;
      for (int64_t t = 0; t < length; t++) {
        double sum = has_bias ? double(bias[c]) : 0.;
        auto from = [&](int64_t k) { return t + k - taps + 1; };
        for (int64_t k = 0; k < taps; k++)
          if (from(k) >= 0) sum += double(weight[c * taps + k]) * x.at(b, c, from(k));
        double s = sigmoid(sum), g = grad_out.at(b, c, t);
        y_.add(out.at(b, c, t), silu ? sum * s : sum);
        if (silu) g *= s * (1 + sum * (1 - s));
        db += g;
        for (int64_t k = 0; k < taps; k++)
          if (from(k) >= 0)
            dx[from(k)] += g * weight[c * taps + k], dw[k] += g * x.at(b, c, from(k));
      }
      for (int64_t t = 0; t < length; t++) x_.add(grad_x.at(b, c, t), dx[t]);
      for (int64_t k = 0; k < taps; k++)
        weight_.add(grad_weight[(b * channels + c) * taps + k], dw[k]);
      if (has_bias) bias_.add(grad_bias[b * channels + c], db);
    }
  report.take("y", y_), report.take("grad_x", x_), report.take("grad_weight", weight_);
  report.take("grad_bias", bias_);
}

template <class T> bool check(const std::string& name, const char* type, double limit, int cases) {
  Report report{limit};
  for (int i = 0; i < cases; i++) {
    source.seed(i);
    report.of = name + " " + type + " scan " + std::to_string(i);
    check_scan<T>(report);
    report.of = name + " " + type + " convolution " + std::to_string(i);
    check_convolution<T>(report);
  }
  std::printf("%s %s: %d scans and convolutions, largest difference %.1e\n", name.c_str(), type,
              cases, report.worst);
  return report.right;
}

}  // namespace

// The number of cases of each kind.
int main(int count, char** words) {
  const int cases = count > 1 ? std::atoi(words[1]) : 100;
  bool right = true;
  for (const std::string& name : instruction_sets()) {
    choose_instruction_set(name);
    right &= check<float>(name, "float", 2e-5, cases);
    right &= check<double>(name, "double", 1e-11, cases);
  }
  return right ? 0 : 1;
}
