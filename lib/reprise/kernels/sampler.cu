// Draws images from a causal network, pixel by pixel, in one launch: one block of threads makes one image.
//
// The work is small and the waiting long: H x W pixels x L layers, each of which needs the one before. Launched one by
// one, every layer of every pixel would cost a launch. Here a block goes through all of them, and what separates two
// layers is a barrier. What a layer made of earlier pixels is kept, in global memory, small enough to stay in the cache.
//
// The network comes as a table of convolutions. Each looks at some pixels of one map and writes one pixel of another:
//
//     out[o] = bias[o] + added[o] + sum over taps t and channels c of weight[t, c, o] * activation(in[t][c])
//
// Maps are H x W x channels, the channels of a pixel side by side. Map 0 is the image.
//
// REAL is float or double. A block has 32 x blockDim.y threads; seen and sums share the block's dynamic memory.

enum Activation { NONE, RELU, GATE };

struct Layer {  // as drawing.py fills it; maps, weights and biases are given by where they begin
    int input, in_channels;    // channels after the activation
    int activation;            // a gate makes one channel of two neighbours: tanh of the first, sigmoid of the second
    int output, out_channels;
    int first_tap, taps;
    int weight, bias;
    int added, added_row;      // a map to add: -1 for none; from the pixel itself (0) or from the one above (-1)
};

struct Tap { int dy, dx; };

struct Canvas {  // one image, its maps, and what does not change
    REAL* maps;
    const Tap* taps;
    const REAL *weights, *biases;
    int height, width;
};

// Channel c of a pixel, after the activation.
__device__ inline REAL activated(const REAL* pixel, int activation, int c) {
    if (activation == GATE) return tanh(pixel[2 * c]) / (1 + exp(-pixel[2 * c + 1]));
    return activation == RELU && pixel[c] < 0 ? (REAL)0 : pixel[c];
}

// The outputs begin .. end - 1 of a layer at one pixel, by all threads of the block.
__device__ inline void evaluate(const Layer& layer, const Canvas& canvas, int y, int x, int begin, int end,
                                REAL* sums, REAL* seen) {
    const int channels = layer.in_channels, stride = layer.activation == GATE ? 2 * channels : channels;
    const int parts = blockDim.y, inputs = layer.taps * channels, pixel = y * canvas.width + x;

    // 1. What the layer sees, copied for all to use; outside of the image there are zeros.
    for (int t = threadIdx.y; t < layer.taps; t += parts) {
        const Tap tap = canvas.taps[layer.first_tap + t];
        const int row = y + tap.dy, column = x + tap.dx;
        const bool inside = row >= 0 && column >= 0 && column < canvas.width;
        const REAL* from = canvas.maps + layer.input + (row * canvas.width + column) * stride;
        for (int c = threadIdx.x; c < channels; c += 32)
            seen[t * channels + c] = inside ? activated(from, layer.activation, c) : (REAL)0;
    }
    __syncthreads();
    for (int first = begin; first < end; first += 32) {
        // 2. Neighbouring threads take neighbouring outputs; each row of threads takes its part of the sum.
        const int o = first + threadIdx.x;
        REAL sum = 0;
        if (o < end) {
            const REAL* weight = canvas.weights + layer.weight + o;
            #pragma unroll 4
            for (int i = threadIdx.y; i < inputs; i += parts) sum += weight[i * layer.out_channels] * seen[i];
        }
        sums[threadIdx.y * 32 + threadIdx.x] = sum;
        __syncthreads();
        // 3. The first row adds the parts up.
        if (threadIdx.y == 0 && o < end) {
            sum = canvas.biases[layer.bias + o];
            for (int part = 0; part < parts; ++part) sum += sums[part * 32 + threadIdx.x];
            const int from = pixel + layer.added_row * canvas.width;
            if (layer.added >= 0 && from >= 0) sum += canvas.maps[layer.added + from * layer.out_channels + o];
            canvas.maps[layer.output + pixel * layer.out_channels + o] = sum;
        }
        __syncthreads();
    }
}

// The first level at which the cumulated probability passes a uniform number, as a value between 0 and 1.
__device__ inline REAL drawn(const REAL* logits, int levels, REAL temperature, double uniform) {
    if (levels == 1) return uniform >= 1 / (1 + exp(logits[0] / temperature)) ? (REAL)1 : (REAL)0;
    REAL largest = logits[0], total = 0, cumulated = 0;
    for (int k = 1; k < levels; ++k) largest = fmax(largest, logits[k]);
    for (int k = 0; k < levels; ++k) total += exp((logits[k] - largest) / temperature);
    int level = 0;
    for (int k = 0; k + 1 < levels; ++k) {
        cumulated += exp((logits[k] - largest) / temperature);
        level += cumulated / total <= uniform;
    }
    return (REAL)level / (levels - 1);
}

// The first row_layers of the table make whole rows: a row of the vertical stack is needed by the row below it only.
extern "C" __global__ void __launch_bounds__(256, 2) sample_images(
        REAL* __restrict__ maps, long long maps_size, const double* __restrict__ uniforms, const bool* __restrict__ known,
        const Layer* __restrict__ layers, int row_layers, int all_layers, const Tap* __restrict__ taps,
        const REAL* __restrict__ weights, const REAL* __restrict__ biases, int biases_size,
        int colours, int height, int width, int logits, int levels, REAL temperature) {
    extern __shared__ REAL memory[];
    REAL* sums = memory;
    REAL* seen = memory + 32 * blockDim.y;
    const Canvas canvas = {maps + blockIdx.x * maps_size, taps, weights, biases + (long long)blockIdx.x * biases_size,
                           height, width};
    const long long first = (long long)blockIdx.x * height * width * colours;

    for (int y = 0; y < height; ++y) {
        if (y > 0)
            for (int l = 0; l < row_layers; ++l)
                for (int x = 0; x < width; ++x)
                    evaluate(layers[l], canvas, y - 1, x, 0, layers[l].out_channels, sums, seen);
        for (int x = 0; x < width; ++x)
            for (int colour = 0; colour < colours; ++colour) {
                for (int l = row_layers; l < all_layers; ++l) {
                    const int share = layers[l].out_channels / colours;
                    evaluate(layers[l], canvas, y, x, colour * share, (colour + 1) * share, sums, seen);
                }
                const int place = (y * width + x) * colours + colour;
                if (threadIdx.x == 0 && threadIdx.y == 0 && !(known && known[first + place]))
                    canvas.maps[place] = drawn(canvas.maps + logits + place * levels, levels, temperature,
                                               uniforms[first + place]);
                __syncthreads();
            }
    }
}
