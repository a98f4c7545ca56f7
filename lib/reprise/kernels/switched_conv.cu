// Switched convolution (Betker 2021): every position of the output has a kernel of its own; and its gradients.
//
//     out[p] = bias + sum over taps t of  x[pixel of tap t under p] · weight[kernel of p][t]
//
// The C_in channels of a pixel lie side by side (N, H, W, C); weight[j][t] is a C_in x C_out matrix. Positions come
// sorted by their kernel: `order` lists them, those of kernel j from bounds[j] to bounds[j + 1]. So a block can take
// positions of ONE kernel, and what it does is a matrix product whose rows are fetched, and written, by index:
//
//     forward       rows: pixels under TILE positions, tap by tap   columns: a weight    depth: taps x C_in
//     grad_input    rows: gradients of TILE positions               columns: a weight    depth: C_out, for one tap
//     grad_weight   rows: taps x C_in of patches                    columns: gradients   depth: positions of a kernel
//
// Slices of DEPTH lie in shared memory. Each of 128 threads makes EACH x EACH sums, so that a number it reads serves
// EACH times. Nothing is added atomically and all sums have one order: the results are the same in every run. After the
// last kernel's positions come those whose index is out of range: NaN, and no gradient.
//
// SCALAR is the type in memory, REAL (float or double) is what we compute in.

#define THREADS 128
#define TILE (16 * EACH)
#define WIDE (8 * EACH)
#define DEPTH 16

struct Layer { int kernels, in_channels, out_channels, height, width, out_height, out_width, size, stride, padding; };
typedef REAL Rows[DEPTH][TILE + 4];  // 4 more: neighbouring lines begin in different banks, and loads of 16 bytes fit
typedef REAL Columns[DEPTH][WIDE + 4];
typedef REAL Sums[EACH][EACH];

// A block's share: `count` places in the order, from `first` on, all of one kernel.
struct Part { int kernel, first, count; };
__device__ inline Part part_of(const int* bounds, int kernels, int block) {
    for (int k = 0; k <= kernels; ++k) {
        const int size = bounds[k + 1] - bounds[k], tiles = (size + TILE - 1) / TILE;
        if (block < tiles) return {k, bounds[k] + block * TILE, min(TILE, size - block * TILE)};
        block -= tiles;
    }
    return {kernels, 0, 0};  // blocks are launched for the worst case: an unfinished tile for every kernel
}

// The upper left pixel of the patch under a position. It may lie outside of the image, as may others of the patch.
struct Corner { int image, top, left; };
__device__ inline Corner corner_of(const Layer& layer, int position) {
    const int column = position % layer.out_width, line = position / layer.out_width;
    return {line / layer.out_height, line % layer.out_height * layer.stride - layer.padding,
            column * layer.stride - layer.padding};
}
// Where in memory the channels of a pixel of the patch begin, maybe beyond 2^31; -1 outside of the image.
__device__ inline long long pixel(const Layer& layer, const Corner& corner, int down, int right) {
    const int y = corner.top + down, x = corner.left + right;
    if (y < 0 || y >= layer.height || x < 0 || x >= layer.width) return -1;
    return (((long long)corner.image * layer.height + y) * layer.width + x) * layer.in_channels;
}

// A thread's own sums: neighbouring rows, and columns in groups of four, which eight threads read without conflict.
__device__ inline int my_row(int i) { return threadIdx.x / 8 * EACH + i; }
__device__ inline int my_column(int j) { return j / 4 * 32 + threadIdx.x % 8 * 4 + j % 4; }
__device__ inline void multiply(Sums& sums, const Rows& rows, const Columns& columns) {
    #pragma unroll
    for (int d = 0; d < DEPTH; ++d)
        #pragma unroll
        for (int i = 0; i < EACH; ++i)
            #pragma unroll
            for (int j = 0; j < EACH; ++j) sums[i][j] += rows[d][my_row(i)] * columns[d][my_column(j)];
}

// sums += rows · matrix. Rows of `depth` numbers begin in memory at begin[row], or are zeros at -1; of the matrix
// (depth, width) it takes the columns from `left` on.
__device__ inline void add_product(Sums& sums, const SCALAR* from, const long long* begin, const SCALAR* matrix,
                                   int depth, int width, int left) {
    alignas(16) __shared__ Rows rows;
    alignas(16) __shared__ Columns columns;
    SCALAR fetched[TILE * DEPTH / THREADS];  // all numbers are on their way before the first one is stored
    for (int first = 0; first < depth; first += DEPTH) {
        __syncthreads();  // everybody knows where rows begin, and nobody needs the last slices any more
        const int d = first + threadIdx.x % DEPTH, column = left + threadIdx.x % WIDE;
        #pragma unroll
        for (int n = 0; n < TILE * DEPTH / THREADS; ++n) {
            const long long at = begin[n * (THREADS / DEPTH) + threadIdx.x / DEPTH];
            fetched[n] = (at >= 0) & (d < depth) ? from[at + d] : (SCALAR)0.0f;
        }
        #pragma unroll
        for (int n = 0; n < TILE * DEPTH / THREADS; ++n)
            rows[threadIdx.x % DEPTH][n * (THREADS / DEPTH) + threadIdx.x / DEPTH] = (REAL)fetched[n];
        #pragma unroll
        for (int n = 0; n < WIDE * DEPTH / THREADS; ++n) {
            const int line = first + n * (THREADS / WIDE) + threadIdx.x / WIDE;
            fetched[n] = (line < depth) & (column < width) ? matrix[(long long)line * width + column] : (SCALAR)0.0f;
        }
        #pragma unroll
        for (int n = 0; n < WIDE * DEPTH / THREADS; ++n)
            columns[n * (THREADS / WIDE) + threadIdx.x / WIDE][threadIdx.x % WIDE] = (REAL)fetched[n];
        __syncthreads();  // the slices are there
        multiply(sums, rows, columns);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) switched_conv_forward(
        const SCALAR* __restrict__ x, const SCALAR* __restrict__ weight,  // (N, H, W, C_in), (K, k, k, C_in, C_out)
        const SCALAR* __restrict__ bias, SCALAR* __restrict__ out,        // (C_out) or null, (N, H', W', C_out)
        const long long* __restrict__ order, const int* __restrict__ bounds, Layer layer) {
    __shared__ long long begin[TILE];
    const Part part = part_of(bounds, layer.kernels, blockIdx.x);
    const int left = blockIdx.y * WIDE, taps = layer.size * layer.size, own = threadIdx.x;
    const bool known = part.kernel < layer.kernels;
    const REAL nothing = known ? (REAL)0 : (REAL)0 / (REAL)0;
    const Corner corner = corner_of(layer, own < part.count ? (int)order[part.first + own] : 0);
    Sums sums = {};
    for (int tap = 0; tap < taps && known; ++tap) {
        const long long matrix = ((long long)part.kernel * taps + tap) * layer.in_channels * layer.out_channels;
        const long long here = pixel(layer, corner, tap / layer.size, tap % layer.size);
        if (own < TILE) begin[own] = own < part.count ? here : -1;
        add_product(sums, x, begin, weight + matrix, layer.in_channels, layer.out_channels, left);
    }
    #pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (my_row(i) >= part.count) continue;
        const long long line = order[part.first + my_row(i)] * layer.out_channels;
        #pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int column = left + my_column(j);
            if (column >= layer.out_channels) continue;
            out[line + column] = (SCALAR)(nothing + sums[i][j] + (bias ? (REAL)bias[column] : (REAL)0));
        }
    }
}

// For one tap: there, no two positions look at the same pixel, so that each adds to its own and needs no atomic.
extern "C" __global__ void __launch_bounds__(THREADS, 3) switched_conv_grad_input(
        const SCALAR* __restrict__ grad, const SCALAR* __restrict__ weight,  // as `out`, (K, k, k, C_out, C_in)
        REAL* __restrict__ grad_x,                                           // (N, H, W, C_in), zeros at first
        const long long* __restrict__ order, const int* __restrict__ bounds, Layer layer, int tap) {
    __shared__ long long begin[TILE], target[TILE];
    const Part part = part_of(bounds, layer.kernels, blockIdx.x);
    if (part.kernel == layer.kernels) return;
    const int left = blockIdx.y * WIDE, taps = layer.size * layer.size, own = threadIdx.x;
    const long long matrix = ((long long)part.kernel * taps + tap) * layer.in_channels * layer.out_channels;
    const long long position = own < part.count ? order[part.first + own] : 0;
    const long long here = pixel(layer, corner_of(layer, (int)position), tap / layer.size, tap % layer.size);
    if (own < TILE) begin[own] = own < part.count ? position * layer.out_channels : -1;
    if (own < TILE) target[own] = own < part.count ? here : -1;
    Sums sums = {};
    add_product(sums, grad, begin, weight + matrix, layer.out_channels, layer.in_channels, left);
    #pragma unroll
    for (int i = 0; i < EACH; ++i)
        #pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int column = left + my_column(j);
            if (target[my_row(i)] >= 0 && column < layer.in_channels) grad_x[target[my_row(i)] + column] += sums[i][j];
        }
}

// Block (x, y, z): every PARTS-th slice of a kernel's positions; some rows, and some columns, of its gradient.
extern "C" __global__ void __launch_bounds__(THREADS, 3) switched_conv_grad_weight(
        const SCALAR* __restrict__ grad, const SCALAR* __restrict__ x,  // as `out`, (N, H, W, C_in)
        REAL* __restrict__ partial,                                     // (K, PARTS, k, k, C_in, C_out)
        const long long* __restrict__ order, const int* __restrict__ bounds, Layer layer, int parts) {
    alignas(16) __shared__ Rows rows;
    alignas(16) __shared__ Columns columns;
    __shared__ Corner corners[DEPTH];
    __shared__ long long begin[DEPTH];
    const int kernel = blockIdx.x / parts, last = bounds[kernel + 1], left = blockIdx.z * WIDE, own = threadIdx.x;
    // A thread fetches one number of each patch, always from the same place in it.
    const int height = layer.size * layer.size * layer.in_channels, top = blockIdx.y * TILE, row = own % TILE;
    const int tap = (top + row) / layer.in_channels, channel = (top + row) % layer.in_channels;
    const int down = tap / layer.size, right = tap % layer.size;
    SCALAR fetched[TILE * DEPTH / THREADS];
    Sums sums = {};
    for (int first = bounds[kernel] + blockIdx.x % parts * DEPTH; first < last; first += parts * DEPTH) {
        if (own < DEPTH) {
            const long long position = first + own < last ? order[first + own] : -1;
            corners[own] = corner_of(layer, max((int)position, 0));
            begin[own] = position < 0 ? -1 : position * layer.out_channels;
        }
        __syncthreads();  // everybody knows the positions, and nobody needs the last slices any more
        #pragma unroll
        for (int n = 0; n < TILE * DEPTH / THREADS; ++n) {
            const int d = n * (THREADS / TILE) + own / TILE;
            const long long here = pixel(layer, corners[d], down, right);
            fetched[n] = (begin[d] >= 0) & (top + row < height) & (here >= 0) ? x[here + channel] : (SCALAR)0.0f;
        }
        #pragma unroll
        for (int n = 0; n < TILE * DEPTH / THREADS; ++n)
            rows[n * (THREADS / TILE) + own / TILE][row] = (REAL)fetched[n];
        #pragma unroll
        for (int n = 0; n < WIDE * DEPTH / THREADS; ++n) {
            const long long at = begin[n * (THREADS / WIDE) + own / WIDE];
            const int column = left + own % WIDE;
            fetched[n] = (at >= 0) & (column < layer.out_channels) ? grad[at + column] : (SCALAR)0.0f;
        }
        #pragma unroll
        for (int n = 0; n < WIDE * DEPTH / THREADS; ++n)
            columns[n * (THREADS / WIDE) + own / WIDE][own % WIDE] = (REAL)fetched[n];
        __syncthreads();  // the slices are there
        multiply(sums, rows, columns);
    }
    #pragma unroll
    for (int i = 0; i < EACH; ++i)
        #pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int line = top + my_row(i), column = left + my_column(j);
            if (line < height && column < layer.out_channels)
                partial[((long long)blockIdx.x * height + line) * layer.out_channels + column] = sums[i][j];
        }
}
