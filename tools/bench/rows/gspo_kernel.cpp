// GSPO (eqs. 6 and 8 of the paper) in one native function, with the tokens' moments that our loss measures: about the
// least that a call can take beside PyTorch's autograd. Without our checks and options; float32, for a CPU.
#include <torch/extension.h>

#include <algorithm>
#include <cmath>
#include <iterator>

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

constexpr int kLanes = 16;  // sums side by side, so that they stay in vector registers

struct Gspo : torch::autograd::Function<Gspo> {
  // log_probs, old [T] float32; advantages [N] float32; cu_seqlens [N + 1] int64; clip bounds of log-ratios; and
  // measured [5] float64, which takes: sum, sum of squares and largest magnitude of the tokens' log-ratios; the
  // responses clipped; the sum of their ratios. Returns the loss, 0-d.
  static Tensor forward(AutogradContext* ctx, Tensor log_probs, Tensor old, Tensor advantages, Tensor cu_seqlens,
                        double clip_low, double clip_high, Tensor measured) {
    const int64_t num_responses = advantages.numel();
    const float *current = log_probs.const_data_ptr<float>(), *before = old.const_data_ptr<float>();
    const float* advantage = advantages.const_data_ptr<float>();
    const int64_t* bounds = cu_seqlens.const_data_ptr<int64_t>();
    Tensor gradients = torch::empty_like(advantages);  // of the loss, by a response's tokens
    float* gradient = gradients.mutable_data_ptr<float>();
    double loss = 0, total = 0, squares = 0, largest = 0, clipped = 0, ratios = 0;
    for (int64_t i = 0; i < num_responses; ++i) {
      float sums[kLanes] = {}, square_sums[kLanes] = {}, magnitudes[kLanes] = {};
      auto add = [&](int64_t t, int lane) {
        const float difference = current[t] - before[t];
        sums[lane] += difference;
        square_sums[lane] += difference * difference;
        magnitudes[lane] = std::max(magnitudes[lane], std::fabs(difference));
      };
      int64_t t = bounds[i];
      for (; t + kLanes <= bounds[i + 1]; t += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) add(t + lane, lane);
      for (; t < bounds[i + 1]; ++t) add(t, 0);
      double sum = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        sum += sums[lane];
        squares += square_sums[lane];
        largest = std::max(largest, double(magnitudes[lane]));
      }
      const double length = bounds[i + 1] - bounds[i], mean = sum / length;
      const bool is_clipped = advantage[i] > 0 ? mean > clip_high : advantage[i] < 0 && mean < clip_low;
      const double used = is_clipped ? (advantage[i] > 0 ? clip_high : clip_low) : mean;
      loss -= std::exp(used) * advantage[i] / num_responses;
      gradient[i] = is_clipped ? 0 : -std::exp(used) * advantage[i] / num_responses / length;
      total += sum;
      clipped += is_clipped;
      ratios += std::exp(mean);
    }
    const double found[] = {total, squares, largest, clipped, ratios};
    std::copy(std::begin(found), std::end(found), measured.mutable_data_ptr<double>());
    ctx->save_for_backward({gradients, cu_seqlens});
    return torch::full({}, loss, log_probs.options());
  }

  static tensor_list backward(AutogradContext* ctx, tensor_list of_loss) {
    const tensor_list saved = ctx->get_saved_variables();
    const float* gradient = saved[0].const_data_ptr<float>();
    const int64_t *bounds = saved[1].const_data_ptr<int64_t>(), num_responses = saved[0].numel();
    const float scale = of_loss[0].item<float>();
    Tensor of_tokens = torch::empty({bounds[num_responses]}, saved[0].options());
    float* written = of_tokens.mutable_data_ptr<float>();
    for (int64_t i = 0; i < num_responses; ++i)
      std::fill(written + bounds[i], written + bounds[i + 1], scale * gradient[i]);
    return {of_tokens, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor gspo(Tensor log_probs, Tensor old, Tensor advantages, Tensor cu_seqlens, double clip_low, double clip_high,
            Tensor measured) {
  return Gspo::apply(log_probs, old, advantages, cu_seqlens, clip_low, clip_high, measured);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) { module.def("gspo", &gspo); }
