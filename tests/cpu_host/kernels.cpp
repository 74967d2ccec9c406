// Every function of a KernelTable, on drawn inputs, against plain loops in double; without torch, so that it runs
// wherever a compiler (or qemu-user) does.
//
//   kernels ISA CASES SEED    prints `ok`, or the first element that is off; KERNELS_FAULT=gemm and so on shifts the results
//                             of that function, to show that they are looked at
//
// Bound of an element: that of tests/numerics.py, and the errors that csrc/cpu/kernels/activations.h states. Inputs end
// at a guard page, outputs besides; elements between the pixels of an output have to stay as they were.
#include "conversions.h"

namespace host {
namespace {

class Kernels : public ConversionsTester {
 public:
  using ConversionsTester::ConversionsTester;

  void run(int64_t cases) {
    for (int64_t i = 0; i < cases; ++i) {
      for (Storage s : {Storage::f32, Storage::f64, Storage::bf16, Storage::f16}) {
        if (table_.depthwise[static_cast<int>(s)]) depthwise(s);
        if (table_.depthwise_output_gradient[static_cast<int>(s)]) depthwise_output_gradient(s, random_.one_of(kSizes));
        if (table_.depthwise_input[static_cast<int>(s)]) depthwise_input(s, random_.one_of(kSizes));
        if (table_.widen[static_cast<int>(s)]) widen(s);
        if (table_.channel_sums[static_cast<int>(s)]) channel_sums(s);
        if (table_.scale_channels[static_cast<int>(s)]) scale_channels(s);
        if (table_.operand[static_cast<int>(s)]) operand(s, s == Storage::f64 ? s : Storage::f32);
        if (table_.grad_input[static_cast<int>(s)]) grad_input(s);
        if (table_.max_pool2d[static_cast<int>(s)]) pool2d(s, random_.one_of(kSizes));
        if (table_.winograd_input[static_cast<int>(s)]) winograd_input(s, random_.one_of(kSizes));
      }
      if (table_.winograd_output) winograd_output(random_.one_of(kSizes));
      unpair();
      transpose();
      if (table_.operand_bf16) operand(Storage::bf16, Storage::bf16);
      if (table_.gemm_bf16) gemm_bf16();
      if (table_.gemm_planes) {
        split_rows();
        split_panels();
        gemm_planes(random_.one_of({1, 15, 16, 17, 31, 32}));
      }
      for (Storage s : {Storage::f32, Storage::f64}) {
        compute_ = s;
        if (table_.gemm[pair()]) gemm();
        if (table_.depthwise_taps[pair()]) depthwise_taps();
        if (table_.activation_grad[pair()]) activation_grad();
      }
    }
    for (Storage s : {Storage::bf16, Storage::f16}) {
      every_16_bits(s);
      rounding(s);
    }
  }
};

}  // namespace
}  // namespace host

int main(int argc, char** argv) {
  if (argc != 4) return std::fprintf(stderr, "usage: kernels ISA CASES SEED\n"), 2;
  for (const cnnfast::KernelTable* table : host::tables()) {
    if (std::string(table->isa) != argv[1]) continue;
    host::Kernels tester(*table, std::strtoull(argv[3], nullptr, 10));
    tester.run(std::atoll(argv[2]));
    std::printf("%lld elements compared\nok\n", static_cast<long long>(tester.compared()));
    return 0;
  }
  return std::fprintf(stderr, "no kernels for %s here\n", argv[1]), 2;
}
