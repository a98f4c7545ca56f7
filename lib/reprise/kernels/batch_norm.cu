// Batch normalisation in training (Ioffe & Szegedy 2015, Algorithm 1) and its gradient.
//
//     y = weight * (x - mean) / sqrt(var + eps) + bias          mean and biased var of each channel over all else
//
// x is (N, C, S) in memory, S the product of the dimensions after the channels. Everything is done in passes over x
// with a grid of (C, PARTS) blocks: the numbers of a channel are shared out among PARTS blocks, enough to fill the GPU
// also where there are few channels. No atomics: sums come out the same in every run.
//
// SCALAR is the type in memory, REAL (float or double) is what we compute in. Blocks are of THREADS threads, a power of
// two. Loads are coalesced as long as S is not small, and four of them are under way at once in each thread.

// The elements of one channel that fall to one thread: i, i + step, i + 2 step, … with i = n * S + s. Division is slow,
// so it is done once and the pair (n, s) is carried along. A tensor may hold more than 2^31 numbers.
struct Walk {
    int n, s, step_n, step_s, batch, size;
    long long channels, channel;
    __device__ inline bool inside() const { return n < batch; }
    __device__ inline long long index() const { return (n * channels + channel) * size + s; }
    __device__ inline void advance() {
        n += step_n;
        s += step_s;
        if (s >= size) { s -= size; ++n; }
    }
};
__device__ inline Walk walk(int batch, int channels, int size, int channel, long long first, long long step) {
    Walk w;
    w.n = (int)min(first / size, (long long)batch); w.s = (int)(first % size);
    w.step_n = (int)min(step / size, (long long)batch); w.step_s = (int)(step % size);
    w.batch = batch; w.size = size; w.channels = channels; w.channel = channel;
    return w;
}
__device__ inline Walk my_walk(int batch, int channels, int size) {
    return walk(batch, channels, size, blockIdx.x, (long long)blockIdx.y * THREADS + threadIdx.x,
                (long long)gridDim.y * THREADS);
}

// Count, mean and sum of squared deviations. The textbook's mean of squares minus square of the mean loses all digits
// where the mean is large; merging deviations does not (Chan, Golub & LeVeque 1983).
struct Moments { REAL count, mean, deviations; };
__device__ inline Moments merged(Moments a, Moments b) {
    if (b.count == 0) return a;
    Moments sum;
    sum.count = a.count + b.count;
    const REAL share = b.count / sum.count, apart = b.mean - a.mean;
    sum.mean = a.mean + apart * share;
    sum.deviations = a.deviations + b.deviations + apart * apart * a.count * share;
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_moments(
        const SCALAR* __restrict__ x, Moments* __restrict__ partial, int batch, int channels, int size) {
    Moments mine = {0, 0, 0};
    for (Walk w = my_walk(batch, channels, size); w.inside();) {
        REAL value[4];
        bool there[4];
        #pragma unroll
        for (int k = 0; k < 4; ++k, w.advance()) {
            there[k] = w.inside();
            value[k] = there[k] ? (REAL)x[w.index()] : (REAL)0;
        }
        Moments four = {0, 0, 0};
        #pragma unroll
        for (int k = 0; k < 4; ++k) { four.count += there[k]; four.mean += value[k]; }
        four.mean /= four.count;
        #pragma unroll
        for (int k = 0; k < 4; ++k)
            if (there[k]) four.deviations += (value[k] - four.mean) * (value[k] - four.mean);
        mine = merged(mine, four);
    }
    __shared__ Moments all[THREADS];
    all[threadIdx.x] = mine;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) all[threadIdx.x] = merged(all[threadIdx.x], all[threadIdx.x + half]);
        __syncthreads();
    }
    if (threadIdx.x == 0) partial[(long long)blockIdx.y * channels + blockIdx.x] = all[0];
}

// One thread for each channel puts its parts together.
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_statistics(
        const Moments* __restrict__ partial, REAL* __restrict__ mean, REAL* __restrict__ var, int parts, int channels) {
    const int c = blockIdx.x * THREADS + threadIdx.x;
    if (c >= channels) return;
    Moments sum = {0, 0, 0};
    for (int part = 0; part < parts; ++part) sum = merged(sum, partial[(long long)part * channels + c]);
    mean[c] = sum.mean;
    var[c] = sum.deviations / sum.count;
}

extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_normalise(
        const SCALAR* __restrict__ x, const REAL* __restrict__ mean, const REAL* __restrict__ var,
        const REAL* __restrict__ weight, const REAL* __restrict__ bias,  // either may be null
        SCALAR* __restrict__ y, REAL eps, int batch, int channels, int size) {
    const int c = blockIdx.x;
    const REAL centre = mean[c], shift = bias ? bias[c] : (REAL)0;
    const REAL scale = (weight ? weight[c] : (REAL)1) / sqrt(var[c] + eps);
    for (Walk w = my_walk(batch, channels, size); w.inside();) {
        REAL value[4];
        long long at[4];
        #pragma unroll
        for (int k = 0; k < 4; ++k, w.advance()) {
            at[k] = w.inside() ? w.index() : -1;
            if (at[k] >= 0) value[k] = x[at[k]];
        }
        #pragma unroll
        for (int k = 0; k < 4; ++k)
            if (at[k] >= 0) y[at[k]] = (SCALAR)((value[k] - centre) * scale + shift);
    }
}

// The two sums over a channel that its gradient needs, which are also those to bias and weight:
// of dL/dy, and of dL/dy times the normalised x. partial is (PARTS, 2, C).
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_sums(
        const SCALAR* __restrict__ grad, const SCALAR* __restrict__ x, const REAL* __restrict__ mean,
        const REAL* __restrict__ var, REAL* __restrict__ partial, REAL eps, int batch, int channels, int size) {
    const int c = blockIdx.x;
    const REAL centre = mean[c];
    REAL sum = 0, product = 0;
    for (Walk w = my_walk(batch, channels, size); w.inside();) {
        REAL slope[4], value[4];
        #pragma unroll
        for (int k = 0; k < 4; ++k, w.advance()) {
            const bool there = w.inside();
            const long long at = there ? w.index() : 0;
            slope[k] = there ? (REAL)grad[at] : (REAL)0;
            value[k] = there ? (REAL)x[at] : centre;
        }
        #pragma unroll
        for (int k = 0; k < 4; ++k) { sum += slope[k]; product += slope[k] * (value[k] - centre); }
    }
    __shared__ REAL sums[THREADS], products[THREADS];
    sums[threadIdx.x] = sum;
    products[threadIdx.x] = product;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            sums[threadIdx.x] += sums[threadIdx.x + half];
            products[threadIdx.x] += products[threadIdx.x + half];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        REAL* row = partial + (long long)blockIdx.y * 2 * channels + c;
        row[0] = sums[0];
        row[channels] = products[0] / sqrt(var[c] + eps);
    }
}

// dL/dx = weight / sqrt(var + eps) * (dL/dy - mean(dL/dy) - normalised x * mean(dL/dy * normalised x))
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_grad_input(
        const SCALAR* __restrict__ grad, const SCALAR* __restrict__ x, const REAL* __restrict__ mean,
        const REAL* __restrict__ var, const REAL* __restrict__ weight, const REAL* __restrict__ sums,  // (2, C)
        SCALAR* __restrict__ grad_x, REAL eps, int batch, int channels, int size) {
    const int c = blockIdx.x;
    const REAL count = (REAL)batch * size, inverse = 1 / sqrt(var[c] + eps), centre = mean[c];
    const REAL scale = (weight ? weight[c] : (REAL)1) * inverse;
    const REAL level = sums[c] / count, tilt = sums[channels + c] / count * inverse;
    for (Walk w = my_walk(batch, channels, size); w.inside();) {
        REAL slope[4], value[4];
        long long at[4];
        #pragma unroll
        for (int k = 0; k < 4; ++k, w.advance()) {
            at[k] = w.inside() ? w.index() : -1;
            if (at[k] >= 0) { slope[k] = grad[at[k]]; value[k] = x[at[k]]; }
        }
        #pragma unroll
        for (int k = 0; k < 4; ++k)
            if (at[k] >= 0) grad_x[at[k]] = (SCALAR)(scale * (slope[k] - level - (value[k] - centre) * tilt));
    }
}
