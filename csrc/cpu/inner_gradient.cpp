// The gradient of an inner step on the CPU, and its derivative in a direction: an encoder, the cross-entropy
// of its outputs against soft embeddings, and the encoder backwards, whose forward pass is made once unless
// there is too much to keep.

#include "inner_gradient.h"

#include <numeric>

#include "encoder_calls.h"
#include "mix_items.h"
#include "registration.h"

namespace td3_fast::cpu {
namespace {

// The tensors of a step: X (b, ζ, d), of which all but the last position are the encoder's inputs, and the
// target positions (b, k), each predicted from the positions before it.
struct StepOptions {
  Tensor histories, positions;
  EncoderOptions encoder;
  int64_t rows, width;

  StepOptions(const Tensor& parameters,
              const Tensor& embeds,
              const Tensor& targets,
              at::TensorList words,
              at::IntArrayRef sizes)
      : histories(all_but_last(embeds)),
        positions(targets.sub(1)),
        encoder(parameters, histories, positions, words, sizes),
        rows(targets.numel()),
        width(embeds.size(2)) {
    encoder.check_causal();
    TORCH_CHECK_VALUE(rows > 0, "expected at least one target, got no target in ", targets.sizes());
  }

  static Tensor all_but_last(const Tensor& embeds) {
    TORCH_CHECK_VALUE(embeds.dim() == 3 && embeds.size(1) >= 2,
                      "expected embeds (b, at least 2 positions, d), got ", embeds.sizes());
    return embeds.narrow(1, 0, embeds.size(1) - 1);
  }
};

// Where the rows of contiguous embeds (b, ζ, d) at the targets (b, k) lie, one after the other.
class TargetRows {
 public:
  TargetRows(const Tensor& embeds, const Tensor& targets)
      : count(targets.numel()),
        width(embeds.size(2)),
        positions_(embeds.size(1)),
        each_(targets.size(1)),
        targets_(targets.contiguous()),
        target_(targets_.const_data_ptr<int64_t>()) {}

  const int64_t count, width;

  // Where row i begins, in elements.
  int64_t at(int64_t i) const { return (i / each_ * positions_ + target_[i]) * width; }

 private:
  int64_t positions_, each_;
  Tensor targets_;
  const int64_t* target_;
};

// Adds factor * rows (b k, d) to the rows of embeds (b, ζ, d) at the targets.
template <typename T>
void add_to_targets(const Tensor& embeds, const Tensor& targets, const Tensor& rows, T factor) {
  const TargetRows place(embeds, targets);
  const Tensor from = rows.contiguous();
  const T* row = from.const_data_ptr<T>();
  T* out = embeds.mutable_data_ptr<T>();
  for (int64_t i = 0; i < place.count; ++i, row += place.width) {
    T* sum = out + place.at(i);
    for (int64_t f = 0; f < place.width; ++f) sum[f] += factor * row[f];
  }
}

// Adds factor * the rows of embeds (b, ζ, d) at the targets to rows (b k, d).
template <typename T>
void add_targets_to(const Tensor& rows, const Tensor& embeds, const Tensor& targets, T factor) {
  const TargetRows place(embeds, targets);
  const Tensor from = embeds.contiguous();
  const T* source = from.const_data_ptr<T>();
  T* sum = rows.mutable_data_ptr<T>();
  for (int64_t i = 0; i < place.count; ++i, sum += place.width) {
    const T* x = source + place.at(i);
    for (int64_t f = 0; f < place.width; ++f) sum[f] += factor * x[f];
  }
}

// The gradient of the outputs (b k, d): `share` (mean - x) with x the rows of embeds (b, ζ, d) at the
// targets.
template <typename T>
Tensor residual(const Tensor& embeds, const Tensor& targets, const Tensor& mean, T share) {
  TORCH_CHECK_VALUE(mean.numel() == targets.numel() * embeds.size(2), "expected ", targets.numel(),
                    " means of rows, got ", mean.sizes());
  const Tensor gradient = mean.contiguous().mul(share);
  add_targets_to<T>(gradient, embeds, targets, -share);
  return gradient;
}

// The sum over all rows of h x, of outputs h (b k, d) and the rows x of embeds (b, ζ, d) at the targets.
template <typename T>
double product_with_targets(const Tensor& embeds, const Tensor& targets, const Tensor& hidden) {
  const TargetRows place(embeds, targets);
  const Tensor from = embeds.contiguous();
  const T *source = from.const_data_ptr<T>(), *h = hidden.const_data_ptr<T>();
  double sum = 0;
  for (int64_t i = 0; i < place.count; ++i, h += place.width) {
    const T* x = source + place.at(i);
    T of_row = 0;
    for (int64_t f = 0; f < place.width; ++f) of_row += h[f] * x[f];
    sum += static_cast<double>(of_row);
  }
  return sum;
}

// Of rows, in double precision as the product is.
template <typename T>
Tensor mean_loss(const Tensor& logsumexp, double product) {
  const T* of_row = logsumexp.const_data_ptr<T>();
  const double sum = std::accumulate(of_row, of_row + logsumexp.numel(), -product);
  const Tensor loss = logsumexp.new_empty({});
  *loss.mutable_data_ptr<T>() = static_cast<T>(sum / static_cast<double>(logsumexp.numel()));
  return loss;
}

Tensor embeds_of(const Tensor& embeds, const OptionalTensor& users) {
  return users ? rows_of_users(embeds, *users) : embeds;
}

template <typename T>
Tensor zeros_like(const Tensor& tensor) {
  const Tensor zeros = fresh(tensor.sizes(), kType<T>);
  std::fill_n(zeros.mutable_data_ptr<T>(), zeros.numel(), T(0));
  return zeros;
}

Tensor nothing(const Tensor& like) {
  return like.new_empty({0});
}

// Gradients of mean over rows of logsumexp(h E^T) - h x, h the outputs and x the embeds at the targets. Those
// of items and embeds only where `trained`. `saved` is what the derivative needs: the outputs and all of
// item_logsumexp_forward.
constexpr size_t kSaved = 5;

StepGradient gradient_of(const StepOptions& step,
                         const Tensor& parameters,
                         const Tensor& embeds,
                         const Tensor& targets,
                         const Tensor& items,
                         at::TensorList words,
                         bool trained) {
  return with_type(embeds, [&](auto zero) {
    using T = decltype(zero);
    EncoderInputs<T> in(step.encoder, parameters, step.histories, step.positions, words);
    const Tensor hidden = embeds.new_empty({step.rows, step.width});
    in.call.outputs = hidden.mutable_data_ptr<T>();
    KeptPass<T> pass(step.encoder.sizes, step.encoder.batch, false);
    pass.forward(step.encoder, in.call);

    auto [logsumexp, remainder, mean, probabilities] = item_logsumexp_forward(hidden, items, true, trained);
    const T share = T(1) / static_cast<T>(step.rows);
    const Tensor grad_hidden = residual<T>(embeds, targets, mean, share);
    const double product = product_with_targets<T>(embeds, targets, hidden);
    const Tensor loss = mean_loss<T>(logsumexp, product);

    const Tensor grad_parameters = parameters.new_empty(parameters.sizes());
    Tensor grad_items = nothing(items), grad_embeds = nothing(embeds);
    in.call.grad_outputs = grad_hidden.const_data_ptr<T>();
    if (trained) {
      const Tensor upstream = embeds.new_full({step.rows}, share);
      grad_items = std::get<1>(item_logsumexp_backward(upstream, hidden, items, logsumexp, remainder, mean,
                                                       probabilities, {false, true}));
      grad_embeds = zeros_like<T>(embeds);
      in.call.grad_inputs = grad_embeds.mutable_data_ptr<T>();
      in.call.grad_input_stride = grad_embeds.stride(0);
    }
    pass.backward(step.encoder, grad_parameters);
    if (trained) add_to_targets<T>(grad_embeds, targets, hidden, -share);
    return StepGradient{
        loss, grad_parameters, grad_items, grad_embeds, {hidden, logsumexp, remainder, mean, probabilities}};
  });
}

// The derivative of those gradients where parameters, items and embeds move by their tangents; equally the
// gradients of what the tangents and those gradients have as inner product: of parameters, items, where these
// have a tangent, and embeds.
std::tuple<Tensor, Tensor, Tensor> derivative_of(const StepOptions& step,
                                                 const Tensor& tangent_parameters,
                                                 const OptionalTensor& tangent_items,
                                                 const OptionalTensor& tangent_embeds,
                                                 const Tensor& parameters,
                                                 const Tensor& embeds,
                                                 const Tensor& targets,
                                                 const Tensor& items,
                                                 at::TensorList saved,
                                                 at::TensorList words) {
  TORCH_CHECK_VALUE(tangent_parameters.sizes() == parameters.sizes() &&
                        (!tangent_items || tangent_items->sizes() == items.sizes()) &&
                        (!tangent_embeds || tangent_embeds->sizes() == embeds.sizes()),
                    "a tangent has the shape of what it moves");
  return with_type(embeds, [&](auto zero) {
    using T = decltype(zero);
    EncoderInputs<T> in(step.encoder, parameters, step.histories, step.positions, words);
    const Tensor moved_parameters = tangent_parameters.contiguous();
    const Tensor moved_embeds = tangent_embeds ? tangent_embeds->contiguous() : Tensor();
    in.call.parameters_tangent = moved_parameters.const_data_ptr<T>();
    if (tangent_embeds) in.move_inputs(moved_embeds);
    const Tensor moved_hidden = embeds.new_empty({step.rows, step.width});
    in.call.outputs = moved_hidden.mutable_data_ptr<T>();
    KeptPass<T> pass(step.encoder.sizes, step.encoder.batch, true);
    pass.forward(step.encoder, in.call);

    const T share = T(1) / static_cast<T>(step.rows);
    const Tensor upstream = embeds.new_full({step.rows}, share);
    const Tensor &hidden = saved[0], &mean = saved[3];
    auto [to_upstream, moved_grad_hidden, moved_grad_items] =
        item_logsumexp_double_backward(moved_hidden, tangent_items, upstream, hidden, items, saved[1],
                                       saved[2], mean, saved[4], {false, true, tangent_items.has_value()});
    if (tangent_embeds) add_targets_to<T>(moved_grad_hidden, moved_embeds, targets, -share);
    const Tensor grad_hidden = residual<T>(embeds, targets, mean, share);
    in.call.grad_outputs = grad_hidden.const_data_ptr<T>();
    in.call.grad_outputs_tangent = moved_grad_hidden.const_data_ptr<T>();

    const Tensor to_parameters = parameters.new_empty(parameters.sizes());
    const Tensor to_embeds = zeros_like<T>(embeds);
    in.call.grad_inputs = to_embeds.mutable_data_ptr<T>();
    in.call.grad_input_stride = to_embeds.stride(0);
    pass.backward(step.encoder, to_parameters);
    add_to_targets<T>(to_embeds, targets, moved_hidden, -share);
    return std::make_tuple(to_parameters, moved_grad_items, to_embeds);
  });
}

// P E (b, ζ, d) of a step.
Tensor mixed(const InnerStep& step, const Tensor& items) {
  return mix_items(step.source.flatten(0, 1), items).unflatten(0, step.source.sizes().slice(0, 2));
}

// The elements of a step's dropout sites, none where nothing is dropped.
std::vector<int64_t> words_of_sites(const EncoderOptions& encoder) {
  std::vector<int64_t> counts(1 + 3 * encoder.sizes.layers);
  for (size_t site = 0; site < counts.size(); ++site) {
    counts[site] = encoder.dropped(site) > 0 ? encoder.site_size(site) : 0;
  }
  return counts;
}

// The random words of all sites that drop, drawn from a seed (1,), or none without one.
Tensor draw_words(const EncoderOptions& encoder, const Tensor& seed) {
  if (seed.numel() == 0) return seed.new_empty({0}, at::kShort);
  std::vector<int64_t> counts = words_of_sites(encoder);
  counts.erase(std::remove(counts.begin(), counts.end(), 0), counts.end());
  return random_words_of_sites(seed, 0, counts);
}

// Those of each site.
std::vector<Tensor> split_words(const EncoderOptions& encoder, const Tensor& words) {
  std::vector<Tensor> sites;
  if (words.numel() == 0) return sites;
  int64_t first = 0;
  for (const int64_t count : words_of_sites(encoder)) {
    sites.push_back(words.narrow(0, first, count));
    first += blocks_of_words(count) * kWordsPerBlock;
  }
  return sites;
}

}  // namespace

Tensor rows_of_users(const Tensor& all, const Tensor& users) {
  const Tensor chosen = users.contiguous();
  const int64_t count = chosen.numel();
  const int64_t* user = chosen.const_data_ptr<int64_t>();
  bool following = chosen.dim() == 1 && count > 0 && user[0] >= 0 && user[0] <= all.size(0) - count;
  for (int64_t i = 1; following && i < count; ++i) following = user[i] == user[0] + i;
  return following ? all.narrow(0, user[0], count) : all.index_select(0, chosen);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> inner_gradient(const Tensor& parameters,
                                                                               const Tensor& embeds_in,
                                                                               const Tensor& targets,
                                                                               const Tensor& items,
                                                                               at::TensorList words,
                                                                               at::IntArrayRef sizes,
                                                                               bool trained,
                                                                               const OptionalTensor& users) {
  const Tensor embeds = embeds_of(embeds_in, users);
  const StepOptions step(parameters, embeds, targets, words, sizes);
  const StepGradient made = gradient_of(step, parameters, embeds, targets, items, words, trained);
  return {made.loss, made.parameters, made.items, made.embeds, made.saved};
}

std::tuple<Tensor, Tensor, Tensor> inner_gradient_tangent(const Tensor& tangent_parameters,
                                                          const OptionalTensor& tangent_items,
                                                          const OptionalTensor& tangent_embeds,
                                                          const Tensor& parameters,
                                                          const Tensor& embeds_in,
                                                          const Tensor& targets,
                                                          const Tensor& items,
                                                          at::TensorList saved,
                                                          at::TensorList words,
                                                          at::IntArrayRef sizes,
                                                          const OptionalTensor& users) {
  const Tensor embeds = embeds_of(embeds_in, users);
  const StepOptions step(parameters, embeds, targets, words, sizes);
  TORCH_CHECK_VALUE(saved.size() == kSaved, "expected the ", kSaved,
                    " tensors that inner_gradient saved, got ", saved.size());
  return derivative_of(step, tangent_parameters, tangent_items, tangent_embeds, parameters, embeds, targets,
                       items, saved, words);
}

// Saved are what inner_gradient saves, the random words and, where they are made here, the embeds.
StepGradient gradient_of_step(const InnerStep& step, const Tensor& parameters, const Tensor& items) {
  const Tensor embeds = step.mixes ? mixed(step, items) : step.source;
  const StepOptions options(parameters, embeds, step.targets, {}, step.sizes);
  const Tensor words = draw_words(options.encoder, step.seed);
  StepGradient made = gradient_of(options, parameters, embeds, step.targets, items,
                                  split_words(options.encoder, words), step.mixes);
  made.saved.push_back(words);
  if (step.mixes) {
    made.saved.push_back(embeds);
    add_to_items(step, made.items, made.embeds);
  }
  return made;
}

std::tuple<Tensor, Tensor, Tensor> derivative_of_step(const InnerStep& step,
                                                      const Tensor& parameters,
                                                      const Tensor& items,
                                                      const Tensor& tangent_parameters,
                                                      const OptionalTensor& tangent_items,
                                                      at::TensorList saved) {
  const Tensor& words = saved[kSaved];
  const Tensor embeds = step.mixes ? saved[kSaved + 1] : step.source;
  const StepOptions options(parameters, embeds, step.targets, {}, step.sizes);
  OptionalTensor tangent_embeds;
  if (tangent_items) tangent_embeds = mixed(step, *tangent_items);
  return derivative_of(options, tangent_parameters, tangent_items, tangent_embeds, parameters, embeds,
                       step.targets, items, saved, split_words(options.encoder, words));
}

int64_t saved_by_step(bool mixes) {
  return kSaved + (mixes ? 2 : 1);
}

void add_to_items(const InnerStep& step, const Tensor& sums, const Tensor& to_embeds) {
  add_items_transposed(sums, step.source.flatten(0, 1), to_embeds.flatten(0, 1));
}

}  // namespace td3_fast::cpu
