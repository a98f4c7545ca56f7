// One step of Adam (Kingma & Ba 2015, Algorithm 1, with torch.optim.Adam's options) for many tensors at once.
//
// A network has hundreds of parameters, most of them small: one launch for each would cost more than the arithmetic.
// So the addresses of up to TENSORS of them travel in one table, by value, as the kernel's argument. Every tensor is cut
// into chunks of CHUNK elements; a block finds its tensor in the table and does one chunk.
//
// Memory is the limit: four numbers read and three written for every parameter. All loads are coalesced, and a thread
// has the loads of four elements under way before it needs the first.
//
// SCALAR is the type in memory, REAL (float or double) is what we compute in.

struct Table {  // as adam.py fills it
    SCALAR* param[TENSORS];
    const SCALAR* grad[TENSORS];
    SCALAR* exp_avg[TENSORS];
    SCALAR* exp_avg_sq[TENSORS];
    SCALAR* max_exp_avg_sq[TENSORS];  // null without amsgrad
    long long size[TENSORS];
    REAL step_size[TENSORS];   // lr / (1 - beta1^t): each tensor may be at a step t of its own
    REAL correction[TENSORS];  // 1 / sqrt(1 - beta2^t)
    int first_block[TENSORS];  // unused places hold the number of all blocks
};

// The last tensor that begins at this block or before it.
__device__ inline int tensor_of(const Table& table, int block) {
    int low = 0, high = TENSORS;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (table.first_block[middle] <= block) low = middle; else high = middle;
    }
    return low;
}

// Where a tensor's chunk begins: a tensor may hold more than 2^31 numbers.
__device__ inline long long chunk_start(int chunk) { return (long long)chunk * CHUNK; }

// beta2 is near 1: rounded to float, 1 - beta2 would lose half of its digits. The host computes it in double.
extern "C" __global__ void __launch_bounds__(256) adam_step(
        const __grid_constant__ Table table, REAL beta1, REAL one_minus_beta1, REAL beta2, REAL one_minus_beta2,
        REAL eps, REAL weight_decay, REAL sign) {
    const int t = tensor_of(table, blockIdx.x);
    const long long start = chunk_start(blockIdx.x - table.first_block[t]);
    const int count = (int)min((long long)CHUNK, table.size[t] - start);
    SCALAR* param = table.param[t] + start;
    const SCALAR* grad = table.grad[t] + start;
    SCALAR* exp_avg = table.exp_avg[t] + start;
    SCALAR* exp_avg_sq = table.exp_avg_sq[t] + start;
    SCALAR* max_exp_avg_sq = table.max_exp_avg_sq[t] ? table.max_exp_avg_sq[t] + start : nullptr;
    const REAL step_size = table.step_size[t], correction = table.correction[t];

    for (int first = threadIdx.x; first < count; first += 4 * blockDim.x) {
        REAL p[4], g[4], m[4], v[4], largest[4];
        #pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int i = first + k * blockDim.x;
            if (i < count) {
                p[k] = param[i]; g[k] = grad[i]; m[k] = exp_avg[i]; v[k] = exp_avg_sq[i];
                if (max_exp_avg_sq) largest[k] = max_exp_avg_sq[i];
            }
        }
        #pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int i = first + k * blockDim.x;
            if (i < count) {
                const REAL slope = sign * g[k] + weight_decay * p[k];
                m[k] = beta1 * m[k] + one_minus_beta1 * slope;
                v[k] = beta2 * v[k] + one_minus_beta2 * slope * slope;
                exp_avg[i] = (SCALAR)m[k];
                exp_avg_sq[i] = (SCALAR)v[k];
                REAL square = v[k];
                if (max_exp_avg_sq) {
                    square = largest[k] > v[k] ? largest[k] : v[k];
                    max_exp_avg_sq[i] = (SCALAR)square;
                }
                param[i] = (SCALAR)(p[k] - step_size * m[k] / (sqrt(square) * correction + eps));
            }
        }
    }
}
