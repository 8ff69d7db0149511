"""The C functions that `export.c` puts together, one for each type of layer.

`functions(names)` returns the text of the functions named, in the order of this file. A name may end with the types of
the values it reads and writes, "convolve_f32", "sum_windows_u8_cur": the text of `FUNCTIONS` without them holds IN and
OUT in their place, and TYPES are their types in C.

Maps are [rows][columns][channels] in memory, so that the weights of one spike and the currents of the neurons that it
reaches are adjacent. `period`: an array of one value for all, one a channel, or one a neuron is read again and again.
"""

TYPES = {"u8": "uint8_t", "i32": "int32_t", "cur": "current_t", "f32": "float"}

STRUCTS = """\
/* Weights in packed bits, the first in the lowest bits of the first byte. A code stands for lowest + step * code. */
struct packed {
    const uint8_t *codes;
    int bits, lowest, step;
};

/* The map that a layer reads, the one that it writes, and its windows. */
struct window {
    int channels, rows, columns;
    int out_channels, out_rows, out_columns;
    int kernel_rows, kernel_columns;
    int stride_rows, stride_columns;
    int pad_rows, pad_columns;
    int dilation_rows, dilation_columns;
    int groups;
};

/* A neuron that fires: where it lies in its map, and how many spikes it sends. */
struct spike {
    int32_t row, column, count;
};
"""

FIRE = """\
/* Integrate-and-fire neurons, reset RESET. hears: whether a current flows; may_fire: whether they may fire. */
static void NAME_IN(const IN *restrict current, int n, const WIDE *restrict Vthr, int period, int hears, int may_fire,
                    WIDE *restrict u, uint8_t *restrict spikes)
{
    if (hears)
        for (int k = 0; k < n; k++)
            u[k] += current[k];
    if (!may_fire) {
        memset(spikes, 0, (size_t)n);
        return;
    }
    for (int start = 0; start < n; start += period)
        for (int k = 0; k < period; k++) {
            const WIDE potential = u[start + k], threshold = Vthr[k];
            const int fires = potential >= threshold;
            spikes[start + k] = (uint8_t)fires;
            u[start + k] = AFTER; /* without a branch, which would be guessed wrong */
        }
}
"""
FUNCTIONS = {
    "unpack": """\
/* n weights from the one numbered `first` on. */
static void unpack(const struct packed *weights, size_t first, int n, current_t *values)
{
    const unsigned mask = (1u << weights->bits) - 1u;
    const int32_t lowest = weights->lowest, step = weights->step;
    size_t bit = first * (size_t)weights->bits;
    const uint8_t *at = weights->codes + bit / 8;
    if (weights->bits == 8) {
        for (int k = 0; k < n; k++)
            values[k] = (current_t)(lowest + step * at[k]);
    } else if (weights->bits == 4 && bit % 8 == 0 && n % 2 == 0) {
        for (int k = 0; k < n; k += 2, at++) {
            values[k] = (current_t)(lowest + step * (*at & 15));
            values[k + 1] = (current_t)(lowest + step * (*at >> 4));
        }
    } else {
        for (int k = 0; k < n; k++, bit += (size_t)weights->bits) {
            at = weights->codes + bit / 8; /* one byte more than the codes take is there to be read */
            values[k] = (current_t)(lowest + step * (int32_t)(((at[0] | (unsigned)at[1] << 8) >> (bit % 8)) & mask));
        }
    }
}
""",
    "add_row": """\
/* The currents of n adjacent neurons that `spikes` spikes of one neuron cause. */
static void add_row(current_t *restrict current, const current_t *restrict weights, int n, int32_t spikes)
{
    int k = 0;
    if (spikes == 1) {
        for (; k + 8 <= n; k += 8) /* eight at a time, which compilers turn into vector instructions */
            for (int j = 0; j < 8; j++)
                current[k + j] = (current_t)(current[k + j] + weights[k + j]);
        for (; k < n; k++)
            current[k] = (current_t)(current[k] + weights[k]);
    } else {
        for (; k < n; k++)
            current[k] = (current_t)(current[k] + spikes * weights[k]);
    }
}
""",
    "reached": """\
/* The output at which a window with the stride `stride` starts at `place`, or -1 if there is none. */
static int reached(int place, int stride, int outputs)
{
    if (place < 0)
        return -1;
    if (stride > 1) {
        if (place % stride)
            return -1;
        place /= stride;
    }
    return place < outputs ? place : -1;
}
""",
    "list_spikes": """\
/* Where the neurons of one channel fire, in `fired`; returns how many do. Without a branch on what is a spike. */
static int list_spikes(const uint8_t *spikes, const struct window *w)
{
    int count = 0;
    for (int y = 0; y < w->rows; y++)
        for (int x = 0; x < w->columns; x++, spikes += w->channels) {
            const struct spike at = {y, x, *spikes};
            fired[count] = at;
            count += *spikes != 0;
        }
    return count;
}
""",
    "spread": """\
/* What `count` neurons in `fired` add to the neurons of one group of channels: `row` holds their weights. */
static void spread(const struct window *w, int n, int count, current_t *group)
{
    for (int i = 0; i < w->kernel_rows; i++)
        for (int j = 0; j < w->kernel_columns; j++) {
            const current_t *weights = row + (i * w->kernel_columns + j) * n;
            const int up = w->pad_rows - i * w->dilation_rows;
            const int left = w->pad_columns - (w->kernel_columns - 1 - j) * w->dilation_columns;
            for (int k = 0; k < count; k++) {
                const int y = reached(fired[k].row + up, w->stride_rows, w->out_rows);
                const int x = reached(fired[k].column + left, w->stride_columns, w->out_columns);
                if (y >= 0 && x >= 0)
                    add_row(group + (y * w->out_columns + x) * w->out_channels, weights, n, fired[k].count);
            }
        }
}
""",
    "spread_runs": """\
/* `spread`, where neurons of all kernel columns are adjacent, as their weights are. */
static void spread_runs(const struct window *w, int n, int count, current_t *current)
{
    const int width = w->kernel_columns, left = w->pad_columns - (width - 1);
    for (int i = 0; i < w->kernel_rows; i++) {
        const current_t *weights = row + i * width * n;
        const int up = w->pad_rows - i * w->dilation_rows;
        for (int k = 0; k < count; k++) {
            const int y = reached(fired[k].row + up, w->stride_rows, w->out_rows);
            const int first = fired[k].column + left, past = w->out_columns - first;
            const int low = first < 0 ? -first : 0, high = past < width ? past : width;
            if (y >= 0 && low < high)
                add_row(current + (y * w->out_columns + first + low) * n, weights + low * n, (high - low) * n,
                        fired[k].count);
        }
    }
}
""",
    "convolve": """\
/* Convolution: every spike adds its weights to the neurons that it reaches.
   Weights: [C_in][kernel rows][kernel columns, the last first][C_out / groups]. */
static void convolve(const uint8_t *spikes, const struct window *w, const struct packed *weights, current_t *current)
{
    const int n = w->out_channels / w->groups, size = w->kernel_rows * w->kernel_columns * n;
    const int is_run = w->stride_columns == 1 && w->dilation_columns == 1 && w->groups == 1;
    for (int c = 0; c < w->channels; c++) {
        const int count = list_spikes(spikes + c, w);
        if (count)
            unpack(weights, (size_t)c * (size_t)size, size, row);
        if (is_run)
            spread_runs(w, n, count, current);
        else
            spread(w, n, count, current + c / (w->channels / w->groups) * n);
    }
}
""",
    "convolve_transposed": """\
/* Transposed convolution: every spike adds its kernel to the map. Weights: [C_in][kernel][C_out / groups]. */
static void convolve_transposed(const uint8_t *spikes, const struct window *w, const struct packed *weights,
                                current_t *current)
{
    const int n = w->out_channels / w->groups, size = w->kernel_rows * w->kernel_columns * n;
    for (int c = 0; c < w->channels; c++) {
        current_t *group = current + c / (w->channels / w->groups) * n;
        int is_unpacked = 0;
        for (int place = 0; place < w->rows * w->columns; place++) {
            const uint8_t count = spikes[place * w->channels + c];
            if (!count)
                continue;
            if (!is_unpacked)
                unpack(weights, (size_t)c * (size_t)size, size, row);
            is_unpacked = 1;
            for (int i = 0; i < w->kernel_rows; i++) {
                const int y = place / w->columns * w->stride_rows - w->pad_rows + i * w->dilation_rows;
                if (y < 0 || y >= w->out_rows)
                    continue;
                for (int j = 0; j < w->kernel_columns; j++) {
                    const int x = place % w->columns * w->stride_columns - w->pad_columns + j * w->dilation_columns;
                    if (x >= 0 && x < w->out_columns)
                        add_row(group + (y * w->out_columns + x) * w->out_channels,
                                row + (i * w->kernel_columns + j) * n, n, count);
                }
            }
        }
    }
}
""",
    "connect": """\
/* Linear layer: every spike adds its weights. Weights: [inputs][outputs]. */
static void connect(const uint8_t *spikes, int inputs, int outputs, const struct packed *weights, current_t *current)
{
    for (int i = 0; i < inputs; i++) {
        if (!spikes[i])
            continue;
        unpack(weights, (size_t)i * (size_t)outputs, outputs, row);
        add_row(current, row, outputs, spikes[i]);
    }
}
""",
    "convolve_f32": """\
/* Convolution of real values. Weights: [C_in][kernel][C_out / groups]. */
static void convolve_f32(const float *x, const struct window *w, const float *weights, float *out)
{
    const int n = w->out_channels / w->groups, size = w->kernel_rows * w->kernel_columns * n;
    for (int c = 0; c < w->channels; c++) {
        const int group = c / (w->channels / w->groups) * n;
        for (int y = 0; y < w->out_rows; y++)
            for (int i = 0; i < w->kernel_rows; i++) {
                const int from_y = y * w->stride_rows - w->pad_rows + i * w->dilation_rows;
                if (from_y < 0 || from_y >= w->rows)
                    continue;
                for (int z = 0; z < w->out_columns; z++)
                    for (int j = 0; j < w->kernel_columns; j++) {
                        const int from_x = z * w->stride_columns - w->pad_columns + j * w->dilation_columns;
                        if (from_x < 0 || from_x >= w->columns)
                            continue;
                        const float value = x[(from_y * w->columns + from_x) * w->channels + c];
                        const float *kernel = weights + c * size + (i * w->kernel_columns + j) * n;
                        float *there = out + (y * w->out_columns + z) * w->out_channels + group;
                        for (int k = 0; k < n; k++)
                            there[k] += value * kernel[k];
                    }
            }
    }
}
""",
    "connect_f32": """\
/* Linear layer of real values. Weights: [inputs][outputs]. */
static void connect_f32(const float *x, int inputs, int outputs, const float *weights, float *out)
{
    for (int i = 0; i < inputs; i++)
        for (int k = 0; k < outputs; k++)
            out[k] += x[i] * weights[i * outputs + k];
}
""",
    "connect_packed_f32": """\
/* Linear layer of real values with integer weights: [inputs][outputs]. */
static void connect_packed_f32(const float *x, int inputs, int outputs, const struct packed *weights, float *out)
{
    for (int i = 0; i < inputs; i++) {
        unpack(weights, (size_t)i * (size_t)outputs, outputs, row);
        for (int k = 0; k < outputs; k++)
            out[k] += x[i] * (float)row[k];
    }
}
""",
    "divide_f32": """\
/* Real values in another unit: that of the membrane potential, or, of sums of integer weights, that of the ANN. */
static void divide_f32(float *x, int n, const float *unit, int period)
{
    for (int start = 0; start < n; start += period)
        for (int k = 0; k < period; k++)
            x[start + k] /= unit[k];
}
""",
    "relu_f32": """\
/* ReLU of real values, cut off at a ceiling. */
static void relu_f32(const float *x, int n, float ceiling, float *out)
{
    for (int k = 0; k < n; k++)
        out[k] = x[k] < 0 ? 0 : x[k] > ceiling ? ceiling : x[k];
}
""",
    "sum_windows": """\
/* Average pooling: the sum of every window. */
static void sum_windows_IN_OUT(const IN *x, const struct window *w, OUT *sums)
{
    for (int y = 0; y < w->out_rows; y++)
        for (int z = 0; z < w->out_columns; z++) {
            OUT *there = sums + (y * w->out_columns + z) * w->channels;
            memset(there, 0, (size_t)w->channels * sizeof *there);
            for (int i = 0; i < w->kernel_rows; i++) {
                const int from_y = y * w->stride_rows - w->pad_rows + i;
                if (from_y < 0 || from_y >= w->rows)
                    continue;
                for (int j = 0; j < w->kernel_columns; j++) {
                    const int from_x = z * w->stride_columns - w->pad_columns + j;
                    if (from_x < 0 || from_x >= w->columns)
                        continue;
                    const IN *from = x + (from_y * w->columns + from_x) * w->channels;
                    for (int c = 0; c < w->channels; c++)
                        there[c] = (OUT)(there[c] + from[c]);
                }
            }
        }
}
""",
    "largest": """\
/* The largest value of every window; of pairs, the smallest of every second channel. */
static void largest_IN(const IN *x, const struct window *w, int pairs, IN *out)
{
    for (int y = 0; y < w->out_rows; y++)
        for (int z = 0; z < w->out_columns; z++)
            for (int c = 0; c < w->channels; c++) {
                IN best = 0;
                int is_found = 0;
                for (int i = 0; i < w->kernel_rows; i++)
                    for (int j = 0; j < w->kernel_columns; j++) {
                        const int from_y = y * w->stride_rows - w->pad_rows + i * w->dilation_rows;
                        const int from_x = z * w->stride_columns - w->pad_columns + j * w->dilation_columns;
                        if (from_y < 0 || from_y >= w->rows || from_x < 0 || from_x >= w->columns)
                            continue;
                        const IN value = x[(from_y * w->columns + from_x) * w->channels + c];
                        if (!is_found || ((pairs && c % 2) ? value < best : value > best))
                            best = value;
                        is_found = 1;
                    }
                out[(y * w->out_columns + z) * w->channels + c] = best;
            }
}
""",
    "gate": """\
/* Max pooling, gate: a spike passes if it raises the largest spike count of its window. */
static void gate(const uint8_t *spikes, const struct window *w, int pairs, int32_t *counts, int32_t *now, int32_t *sent,
                 uint8_t *out)
{
    for (int k = 0; k < w->rows * w->columns * w->channels; k++)
        counts[k] += spikes[k];
    largest_i32(counts, w, pairs, now);
    for (int k = 0; k < w->out_rows * w->out_columns * w->out_channels; k++) {
        out[k] = (uint8_t)(now[k] - sent[k]);
        sent[k] = now[k];
    }
}
""",
    "fill": """\
/* Biases, or initial potentials. */
static void fill_IN(IN *x, int n, const IN *values, int period)
{
    for (int start = 0; start < n; start += period)
        for (int k = 0; k < period; k++)
            x[start + k] = values[k];
}
""",
    "add": """\
/* One branch of an addition: out += weight * x. */
static void add_IN_OUT(const IN *x, int n, const OUT *weight, int period, OUT *out)
{
    for (int start = 0; start < n; start += period)
        for (int k = 0; k < period; k++)
            out[start + k] = (OUT)(out[start + k] + weight[k] * (OUT)x[start + k]);
}
""",
    "split_signs": """\
/* Currents of either sign for pairs of neurons: x for the first, -x for the second (0 for a slope of 0). */
static void split_signs_IN(const IN *x, int n, const int8_t *hears, int period, IN *out)
{
    for (int start = 0; start < n; start += period)
        for (int k = 0; k < period; k++) {
            out[2 * (start + k)] = x[start + k];
            out[2 * (start + k) + 1] = (IN)(hears[k] ? -x[start + k] : 0);
        }
}
""",
    "merge_signs": """\
/* The values that pairs of spikes stand for, first + sign * second; weights: of first, second, first, ... */
static void merge_signs_IN_OUT(const IN *x, int n, const OUT *weights, int period, OUT *out)
{
    for (int start = 0; start < n; start += period)
        for (int k = 0; k < period; k++) {
            const IN *pair = x + 2 * (start + k);
            out[start + k] = (OUT)(weights[2 * k] * (OUT)pair[0] + weights[2 * k + 1] * (OUT)pair[1]);
        }
}
""",
    "choose": """\
/* Chosen rows, columns and channels of a map, in any order; -1 stands for a zero. */
static void choose_IN(const IN *x, int columns, int channels, const int16_t *rows_read, int out_rows,
                      const int16_t *columns_read, int out_columns, const int16_t *channels_read, int out_channels,
                      IN *out)
{
    for (int y = 0; y < out_rows; y++)
        for (int z = 0; z < out_columns; z++)
            for (int c = 0; c < out_channels; c++) {
                const int i = rows_read[y], j = columns_read[z], k = channels_read[c];
                *out++ = i < 0 || j < 0 || k < 0 ? 0 : x[(i * columns + j) * channels + k];
            }
}
""",
    "rearrange": """\
/* Values in other places; -1 stands for a zero. */
static void rearrange_IN(const IN *x, int n, const int32_t *places, IN *out)
{
    for (int k = 0; k < n; k++)
        out[k] = places[k] < 0 ? 0 : x[places[k]];
}
""",
    "join": """\
/* One input of a concatenation: n adjacent values in every row of `width`. */
static void join_IN_OUT(const IN *x, int rows, int n, OUT *out, int width)
{
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < n; k++)
            out[i * width + k] = (OUT)x[i * n + k];
}
""",
    "delay": """\
/* What was sent `depth` steps ago: the layers beside it listen for so many steps. */
static void delay_IN(const IN *x, int n, IN *kept, int depth, int t, IN *out)
{
    IN *slot = kept + t % depth * n;
    memcpy(out, slot, (size_t)n * sizeof *x);
    memcpy(slot, x, (size_t)n * sizeof *x);
}
""",
    **{
        f"fire_{mode}": FIRE.replace("NAME", f"fire_{mode}").replace("RESET", words).replace("AFTER", after)
        for mode, words, after in (
            ("subtraction", "by subtraction", "potential - threshold * (WIDE)fires"),
            ("zero", "to zero", "potential * (WIDE)!fires"),
        )
    },
    "count": """\
/* Spike counts, for what reads all steps. */
static void count(const uint8_t *spikes, int n, uint32_t *counts)
{
    for (int k = 0; k < n; k++)
        counts[k] += spikes[k];
}
""",
    "decode": """\
/* The activations that spike counts stand for; share: lambda / T. */
static void decode(const uint32_t *counts, int n, const float *share, int period, float *out)
{
    for (int start = 0; start < n; start += period)
        for (int k = 0; k < period; k++)
            out[start + k] = (float)counts[start + k] * share[k];
}
""",
}
NEEDED = {
    "convolve": ("unpack", "add_row", "reached", "list_spikes", "spread", "spread_runs"),
    "convolve_transposed": ("unpack", "add_row"),
    "connect": ("unpack", "add_row"),
    "connect_packed_f32": ("unpack",),
    "gate": ("largest_i32",),
}


def functions(names):
    """The C text of the functions named and of those that they call, in the order of `FUNCTIONS`."""
    wanted = {*names, *(needed for name in names for needed in NEEDED.get(name, ()))}
    texts = []
    for base, text in FUNCTIONS.items():
        for name in sorted(wanted):
            if name == base or (name not in FUNCTIONS and base == base_of(name)):
                texts.append(typed(text, name[len(base) + 1 :].split("_")))
    return "\n".join(texts)


def base_of(name):
    """A function's name without its types: "sum_windows_u8_cur" -> "sum_windows"."""
    parts = name.split("_")
    while parts[-1] in TYPES:
        parts.pop()
    return "_".join(parts)


def typed(text, types):
    """A function's text with the types that its name ends with."""
    if types == [""] or "IN" not in text:
        return text
    first, last = types[0], types[-1]
    text = text.replace("WIDE", "float" if first == "f32" else "int32_t")
    text = text.replace("_IN_OUT(", f"_{first}_{last}(").replace("_IN(", f"_{first}(")
    return (
        text.replace("IN ", f"{TYPES[first]} ")
        .replace("OUT ", f"{TYPES[last]} ")
        .replace("(OUT)", f"({TYPES[last]})")
        .replace("(IN)", f"({TYPES[first]})")
    )
