// The transforms of csrc/cpu/kernels/conv2d_winograd.h against their matrices in double.
#pragma once
#include "tester.h"

namespace host {

constexpr int kInput[4][4] = {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, 1, 0, -1}};  // B^T
constexpr int kOutput[2][4] = {{1, 1, 1, 0}, {0, 1, -1, -1}};                              // A^T

class WinogradTester : public Tester {
 public:
  using Tester::Tester;

 protected:
  void winograd_input(Storage storage, int64_t c) {
    compute_ = Storage::f32;
    const int64_t height = 1 + random_.below(9), width = 1 + random_.below(9);
    const int64_t pad_top = random_.below(4), pad_left = random_.below(4);
    const int64_t rows = (height + pad_top) / 2 + 1, tiles = (width + pad_left) / 2 + 1, row = random_.below(rows);
    const int64_t padded = round_up(c, kPanel), v_row = padded + random_.below(3);
    const int64_t v_matrix = tiles * v_row + random_.below(3);
    context("storage", static_cast<int>(storage), "channels", c, "height", height, "width", width, "above", pad_top,
            "before", pad_left, "row", row);
    Buffer x(storage, height * width * c), v(Storage::f32, 15 * v_matrix + (tiles - 1) * v_row + padded);
    x.draw(random_);
    table_.winograd_input[static_cast<int>(storage)](
        {x.data(), height, width, c, pad_top, pad_left, row, tiles, v.data(), v_row, v_matrix});
    for (int64_t i = 0; i < v.count(); ++i) {
      const int64_t matrix = i / v_matrix, tile = i % v_matrix / v_row, channel = i % v_matrix % v_row;
      if (channel >= padded || tile >= tiles) {
        expect_gap("winograd_input", v, i);
        continue;
      }
      double sum = 0, size = 0;
      for (int64_t a = 0; a < 4; ++a)
        for (int64_t b = 0; b < 4; ++b) {
          const int64_t h = 2 * row - pad_top + a, w = 2 * tile - pad_left + b;
          if (h < 0 || h >= height || w < 0 || w >= width || channel >= c) continue;
          const double term = kInput[matrix / 4][a] * kInput[matrix % 4][b] * x[(h * width + w) * c + channel];
          sum += term;
          size += std::abs(term);
        }
      expect("winograd_input", v, i, sum, size, 4);
    }
  }

  void winograd_output(int64_t c) {
    compute_ = Storage::f32;
    const int64_t height = 1 + random_.below(9), width = 1 + random_.below(9), tiles = (width + 1) / 2;
    const int64_t row = random_.below((height + 1) / 2), padded = round_up(c, kPanel);
    const int64_t m_row = padded + random_.below(3), m_matrix = tiles * m_row + random_.below(3);
    const int64_t act = random_.below(kActivations);
    const bool added = random_.below(2);
    const int64_t y_pixel = c + random_.below(3);
    context("channels", c, "height", height, "width", width, "row", row, "residual", added, "activation", act);
    Buffer m(Storage::f32, 15 * m_matrix + (tiles - 1) * m_row + padded), bias(Storage::f32, padded);
    Buffer y(output_storage(), (height * width - 1) * y_pixel + c), residual(y.storage(), height * width * c);
    m.draw(random_), bias.draw(random_), residual.draw(random_);
    table_.winograd_output({m.data(), m_row, m_matrix, bias.data(), added ? residual.data() : nullptr, y.data(),
                            y.storage(), y_pixel, height, width, c, row, tiles, activation(act)});
    for (int64_t i = 0; i < y.count(); ++i) {
      const int64_t pixel = i / y_pixel, h = pixel / width, w = pixel % width, channel = i % y_pixel;
      if (h / 2 != row || channel >= c) {
        expect_gap("winograd_output", y, i);
        continue;
      }
      const double before = added ? residual[pixel * c + channel] : 0;
      double sum = bias[channel] + before;
      double size = std::abs(bias[channel]) + std::abs(before);
      for (int64_t a = 0; a < 4; ++a)
        for (int64_t b = 0; b < 4; ++b) {
          const double term =
              kOutput[h % 2][a] * kOutput[w % 2][b] * m[(a * 4 + b) * m_matrix + w / 2 * m_row + channel];
          sum += term;
          size += std::abs(term);
        }
      const double ref = activated(act, sum);
      expect("winograd_output", y, i, ref, size, 9, act < kFirstCurve ? 0 : kCurveError * std::abs(ref));
    }
  }
};

}  // namespace host
