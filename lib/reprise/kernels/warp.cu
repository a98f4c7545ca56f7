// Bilinear warp by a dense flow, and its two gradients.
//
//     out[n, c, y, x] = image[n, c] at (x + flow[n, 0, y, x], y + flow[n, 1, y, x]), in pixels
//
// Between pixels the image is interpolated; outside, its border is repeated.
//
// One thread makes one output PIXEL: it reads the flow and works out the position once, for all channels. A block is a
// tile of 32 x 8 pixels, so that neighbouring threads write neighbouring pixels (coalesced), and so that the image rows
// that a smooth flow reads twice are still in the cache. There is no division, and nothing is shared between threads.
//
// IMAGE and FLOW are the types in memory, REAL (float or double) is what we compute in: positions need float's digits.

struct Taps {          // the four pixels around a position
    int x0, x1, y0, y1;
    REAL ax, ay;       // how far the position is from x0 towards x1, from y0 towards y1
    bool free_x, free_y;  // whether the position still moves with the flow: it does not where the border is repeated
    bool known;        // false for NaN
};

// Rounding comes last: a float beyond int's range has no int (CUDA and the CPU then differ), so we clamp before we cast.
// fmax and fmin return their other argument for NaN, so NaN becomes pixel 0, with a weight of NaN.
__device__ inline Taps taps_at(REAL x, REAL y, int height, int width) {
    Taps t;
    const REAL right = (REAL)(width - 1), bottom = (REAL)(height - 1);
    const REAL inside_x = fmin(fmax(x, (REAL)0), right), inside_y = fmin(fmax(y, (REAL)0), bottom);
    const REAL left = floor(inside_x), top = floor(inside_y);
    t.x0 = (int)left;
    t.y0 = (int)top;
    t.x1 = min(t.x0 + 1, width - 1);
    t.y1 = min(t.y0 + 1, height - 1);
    t.known = x == x && y == y;
    t.ax = x == x ? inside_x - left : x;
    t.ay = y == y ? inside_y - top : y;
    t.free_x = x >= (REAL)0 && x <= right;
    t.free_y = y >= (REAL)0 && y <= bottom;
    return t;
}

// Where channel c of example n begins. A batch may hold more than 2^31 numbers, a single plane may not.
__device__ inline long long plane(int n, int c, int channels, int size) {
    return ((long long)n * channels + c) * size;
}

extern "C" __global__ void __launch_bounds__(256) warp_forward(
        const IMAGE* __restrict__ image, const FLOW* __restrict__ flow, IMAGE* __restrict__ out,
        int batch, int channels, int height, int width, int out_height, int out_width) {
    const int x = blockIdx.x * blockDim.x + threadIdx.x;
    const int y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= out_width || y >= out_height) return;
    const int in_size = height * width, out_size = out_height * out_width, pixel = y * out_width + x;

    for (int n = blockIdx.z; n < batch; n += gridDim.z) {
        const FLOW* d = flow + plane(n, 0, 2, out_size) + pixel;
        const Taps t = taps_at(x + (REAL)d[0], y + (REAL)d[out_size], height, width);
        const int p00 = t.y0 * width + t.x0, p01 = t.y0 * width + t.x1;
        const int p10 = t.y1 * width + t.x0, p11 = t.y1 * width + t.x1;
        const IMAGE* source = image + plane(n, 0, channels, in_size);
        IMAGE* target = out + plane(n, 0, channels, out_size) + pixel;
        #pragma unroll 4  // the reads of four channels are under way at once
        for (int c = 0; c < channels; ++c, source += in_size, target += out_size) {
            const REAL v00 = source[p00], v01 = source[p01], v10 = source[p10], v11 = source[p11];
            const REAL above = v00 + t.ax * (v01 - v00), below = v10 + t.ax * (v11 - v10);
            *target = (IMAGE)(above + t.ay * (below - above));
        }
    }
}

// Either gradient may be null, and is then not computed.
//   to the image: each output pixel adds to the four it was made of. Several output pixels may share one, hence atomics,
//                 in an order that differs from run to run; the sums are kept in REAL, and start from zeros.
//   to the flow:  each output pixel has its own; a sum over channels.
// A pixel whose flow is NaN adds nothing to the image's gradient, and has a flow gradient of zero.
extern "C" __global__ void __launch_bounds__(256) warp_backward(
        const IMAGE* __restrict__ grad_out, const IMAGE* __restrict__ image, const FLOW* __restrict__ flow,
        REAL* __restrict__ grad_image, FLOW* __restrict__ grad_flow,
        int batch, int channels, int height, int width, int out_height, int out_width) {
    const int x = blockIdx.x * blockDim.x + threadIdx.x;
    const int y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= out_width || y >= out_height) return;
    const int in_size = height * width, out_size = out_height * out_width, pixel = y * out_width + x;

    for (int n = blockIdx.z; n < batch; n += gridDim.z) {
        const long long here = plane(n, 0, 2, out_size) + pixel;
        const Taps t = taps_at(x + (REAL)flow[here], y + (REAL)flow[here + out_size], height, width);
        REAL slope_x = 0, slope_y = 0;
        if (t.known) {
            const REAL bx = 1 - t.ax, by = 1 - t.ay;
            const int p00 = t.y0 * width + t.x0, p01 = t.y0 * width + t.x1;
            const int p10 = t.y1 * width + t.x0, p11 = t.y1 * width + t.x1;
            const IMAGE* slope = grad_out + plane(n, 0, channels, out_size) + pixel;
            const long long first = plane(n, 0, channels, in_size);
            for (int c = 0; c < channels; ++c) {
                const REAL g = slope[(long long)c * out_size];
                const long long base = first + (long long)c * in_size;
                if (grad_image) {
                    REAL* sums = grad_image + base;
                    atomicAdd(sums + p00, g * bx * by);
                    atomicAdd(sums + p01, g * t.ax * by);
                    atomicAdd(sums + p10, g * bx * t.ay);
                    atomicAdd(sums + p11, g * t.ax * t.ay);
                }
                if (grad_flow) {
                    const IMAGE* source = image + base;
                    const REAL v00 = source[p00], v01 = source[p01], v10 = source[p10], v11 = source[p11];
                    slope_x += g * (by * (v01 - v00) + t.ay * (v11 - v10));
                    slope_y += g * (bx * (v10 - v00) + t.ax * (v11 - v01));
                }
            }
        }
        if (grad_flow) {
            grad_flow[here] = (FLOW)(t.free_x ? slope_x : (REAL)0);
            grad_flow[here + out_size] = (FLOW)(t.free_y ? slope_y : (REAL)0);
        }
    }
}
