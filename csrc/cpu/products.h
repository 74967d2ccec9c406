// Matrix products of stages: with packed weights, on one thread or shared among the threads; in bfloat16, in floats, or in
// floats as three bfloat16 (kernels/amx_planes.h).
#pragma once
#include "common.h"
#include "packing.h"

namespace cnnfast::cpu {

// Bytes of intermediate that a tile may keep, so that it stays in L2 (1 to 2 MiB a core on servers) beside a group of
// weight panels and the rows of x that are being read.
constexpr int64_t kTileBytes = 290'000;

// What the left operand of a product with these weights is stored as: bfloat16 where both are and the ISA multiplies it,
// else the compute type.
Storage operand_storage(const KernelTable& table, Storage storage, const PointwiseWeights& weights);
// rows, a and y are the caller's to fill in; a bfloat16 a is finite, or anything that zeros may be multiplied with, up to
// a depth of whole kPairDepth.
GemmTile packed_gemm(const PointwiseWeights& weights, Storage a_storage, Storage y_storage, int64_t activation_code);
// Zeros after the channels of each of `pixels` rows of a bfloat16 left side, up to the next row or a whole kPairDepth;
// nothing for other types.
void clear_tail(const GemmTile& tile, char* rows, int64_t pixels);
// Pixels side by side in memory to such rows.
void copy_padded(const GemmTile& tile, const char* from, char* rows, int64_t pixels);
// How a product's rows are shared out: in multiples of so many, and in blocks of so many bytes of its left side, before
// that is in planes: then of more rows, since each block splits the weights again.
inline int64_t rows_together(const KernelTable& table, const GemmTile& tile) {
  return tile.a_storage == Storage::bf16 || tile.in_planes ? kPairDepth : table.gemm_rows;
}
inline int64_t block_bytes(const GemmTile& tile) { return tile.in_planes ? kTileBytes : kTileBytes / 2; }
// Packed weights of up to so many bytes are in L2 whenever they are read again soon.
constexpr int64_t kStayingBytes = 1'250'000;
inline int64_t weight_bytes(const GemmTile& tile) { return tile.depth * tile.cols * storage_size(tile.b_storage); }
// Whether they are to be: bfloat16 weights of a product with so many rows in all that the first reading hardly counts.
bool stays_in_l2(const GemmTile& tile, int64_t rows);
// Columns [col, col + cols), col a multiple of kPanel.
GemmTile columns_of(const GemmTile& whole, int64_t col, int64_t cols);
// Whether a product of an image of `pixels` is to be in planes: told by its shape alone, as an output's bits are.
bool pays_in_planes(const KernelTable& table, const GemmTile& tile, int64_t pixels);
// The product with its left side in planes, if it is to be: in this thread's scratch, made with the help of idle threads,
// until the next such. Else, and of such a product, itself.
GemmTile in_planes(const Worker& worker, const KernelTable& table, const GemmTile& whole);
// Of a convolution: `whole` reads windows, out_w from one line to the next, of `lines` of floats, a whole kPairDepth of
// them each.
GemmTile windows_in_planes(const Worker& worker, const KernelTable& table, const GemmTile& whole, int64_t lines,
                           int64_t line, int64_t out_w);
// The product on this thread.
void multiply(const KernelTable& table, const GemmTile& tile);
// A task's product, in parts that idle threads help with: groups of panels or blocks of rows, of the larger operand.
void gemm_in_parts(const Worker& worker, const KernelTable& table, const GemmTile& whole);
// The whole product on all threads.
void gemm_on_threads(const KernelTable& table, const GemmTile& whole);

}  // namespace cnnfast::cpu
