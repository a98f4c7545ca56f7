// Parzen window (Breuleux et al. 2011): log-densities of points under a Gaussian around every sample, for many widths.
//
//     out[w, p] = log( mean over s of exp(-|point p - sample s|^2 / (2 width^2)) / (sqrt(2 pi) width)^D )
//
// Ten thousand points and samples have a hundred million distances. None is kept: a block makes a TILE x TILE square of
// them in shared memory, folds it into its sums at once and goes on to the next samples. All that is remembered of a
// point is the smallest squared distance so far and, for each width, a sum relative to it:
//
//     sum over s of exp(-distance_s / (2 width^2)) = exp(-nearest / (2 width^2)) * sum
//
// The nearest sample adds exactly 1 to the sum, so that nothing underflows however small the width. When a nearer one
// turns up, the sums so far shrink by exp(-(old - new) / (2 width^2)). One minimum serves all widths.
//
// Differences are squared one by one. |x|^2 + |y|^2 - 2 x.y would be a matrix product, which GPUs do faster; but for
// near neighbours it is a small difference of large numbers, and near neighbours are all that a small width looks at.
//
// SCALAR is the type in memory, REAL (float or double) is what we compute in. A block has SIDE x SIDE threads.

#define EACH (TILE / SIDE)          // a thread makes EACH x EACH distances: eight numbers read for 16 differences
#define THREADS (SIDE * SIDE)
#define PADDED (TILE + 4)           // rows that begin in different banks; 4 keeps them aligned for loads of 16 bytes

// What a sample adds, if the nearest one adds 1. Equal is asked for since inf - inf is not a number.
__device__ inline REAL share(REAL nearest, REAL distance, REAL width) {
    const REAL nearer_by = distance == nearest ? (REAL)0 : distance - nearest;
    return exp(-nearer_by * ((REAL)0.5 / (width * width)));
}

// Places in memory may lie beyond 2^31: rows of D numbers, and the sums (W, PARTS, P).
__device__ inline long long in_row(int row, int dimensions, int d) { return (long long)row * dimensions + d; }
__device__ inline long long in_sums(int width, int parts, int part, int point_count, int point) {
    return ((long long)width * parts + part) * point_count + point;
}

// A slice: DEPTH dimensions of TILE rows. Neighbouring threads read neighbouring dimensions (coalesced) and store them
// as a column. Beyond the edges there are zeros: a dimension that is not there adds no distance.
__device__ inline void load(REAL (*slice)[PADDED], const SCALAR* rows, int first_row, int row_count,
                            int first_dimension, int dimensions) {
    #pragma unroll
    for (int i = threadIdx.x; i < TILE * DEPTH; i += THREADS) {
        const int row = first_row + i / DEPTH, d = first_dimension + i % DEPTH;
        const bool inside = row < row_count && d < dimensions;
        slice[i % DEPTH][i / DEPTH] = inside ? (REAL)rows[in_row(row, dimensions, d)] : (REAL)0;
    }
}

// Block (x, y) folds every PARTS-th tile of samples, from the y-th on, into what it knows of TILE points.
extern "C" __global__ void __launch_bounds__(THREADS) parzen_fold(
        const SCALAR* __restrict__ points, const SCALAR* __restrict__ samples, const REAL* __restrict__ widths,
        REAL* __restrict__ nearest_of, REAL* __restrict__ sums,  // (PARTS, P) and (W, PARTS, P)
        int point_count, int sample_count, int dimensions, int width_count) {
    alignas(16) __shared__ REAL point_slice[DEPTH][PADDED];
    alignas(16) __shared__ REAL sample_slice[DEPTH][PADDED];
    alignas(16) __shared__ REAL squared[TILE][TILE];  // sample, point
    const int parts = gridDim.y, part = blockIdx.y, first_point = blockIdx.x * TILE;
    const int my_points = threadIdx.x % SIDE * EACH, my_samples = threadIdx.x / SIDE * EACH;  // when it makes distances
    const int column = threadIdx.x % TILE, point = first_point + column;  // when it folds
    REAL nearest = (REAL)1 / (REAL)0;  // infinitely far

    for (int first = part * TILE; first < sample_count; first += parts * TILE) {
        REAL distance[EACH][EACH] = {};
        for (int d = 0; d < dimensions; d += DEPTH) {
            load(point_slice, points, first_point, point_count, d, dimensions);
            load(sample_slice, samples, first, sample_count, d, dimensions);
            __syncthreads();  // the slices are there
            #pragma unroll
            for (int k = 0; k < DEPTH; ++k)
                #pragma unroll
                for (int j = 0; j < EACH; ++j)
                    #pragma unroll
                    for (int i = 0; i < EACH; ++i) {
                        const REAL apart = point_slice[k][my_points + i] - sample_slice[k][my_samples + j];
                        distance[j][i] += apart * apart;
                    }
            __syncthreads();  // nobody needs them any more
        }
        #pragma unroll
        for (int j = 0; j < EACH; ++j)
            #pragma unroll
            for (int i = 0; i < EACH; ++i) squared[my_samples + j][my_points + i] = distance[j][i];
        __syncthreads();  // the tile is there

        const int count = min(TILE, sample_count - first);
        const REAL before = nearest;
        for (int s = 0; s < count; ++s) nearest = fmin(nearest, squared[s][column]);  // passes over NaN; + does not
        for (int w = threadIdx.x / TILE; w < width_count && point < point_count; w += THREADS / TILE) {
            // Nobody else touches this number, so that it may stay in global memory between tiles.
            REAL* total = sums + in_sums(w, parts, part, point_count, point);
            REAL sum = first == part * TILE ? (REAL)0 : *total * share(nearest, before, widths[w]);
            for (int s = 0; s < count; ++s) sum += share(nearest, squared[s][column], widths[w]);
            *total = sum;
        }
        // The next tile is written after the barriers of its slices, when all threads are done with this one.
    }
    if (threadIdx.x < TILE && point < point_count) nearest_of[in_sums(0, parts, part, point_count, point)] = nearest;
}

// One thread for each width and point puts the parts together, in the same way, and takes the logarithm, in double: the
// three terms may be large and cancel, and there are few of them.
extern "C" __global__ void __launch_bounds__(THREADS) parzen_merge(
        const REAL* __restrict__ nearest_of, const REAL* __restrict__ sums, const REAL* __restrict__ widths,
        REAL* __restrict__ out, int parts, int point_count, int sample_count, int dimensions, int width_count) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= (long long)width_count * point_count) return;
    const int w = (int)(i / point_count), point = (int)(i % point_count);

    REAL nearest = nearest_of[point], sum = 0;
    for (int part = 1; part < parts; ++part)
        nearest = fmin(nearest, nearest_of[in_sums(0, parts, part, point_count, point)]);
    for (int part = 0; part < parts; ++part)
        sum += sums[in_sums(w, parts, part, point_count, point)]
            * share(nearest, nearest_of[in_sums(0, parts, part, point_count, point)], widths[w]);
    const double width = widths[w], root_of_two_pi = 2.5066282746310002;
    out[i] = (REAL)(log((double)sum / sample_count) - nearest / (2 * width * width)
                    - dimensions * log(root_of_two_pi * width));
}
