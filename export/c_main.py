"""The main of the C program, which replays test vectors (`export.c.vectors_of`)."""

MAIN = """\
static int first_differs; /* spike counts that differ where the first currents are those of this program */

static void fail(const char *what, const char *name)
{
    fprintf(stderr, "error: %s %s\\n", what, name);
    exit(1);
}

/* n values of a vector file, which are little-endian as this machine has to be. */
static void take(FILE *file, void *data, size_t size, int n)
{
    if (fread(data, size, (size_t)n, file) != (size_t)n)
        fail("the vectors end early, at", "a layer");
}

/* Whether two real values differ by more than sums in another order do. */
static int differ(const float *x, const float *y, int n)
{
    float largest = 1;
    for (int k = 0; k < n; k++)
        largest = x[k] > largest ? x[k] : -x[k] > largest ? -x[k] : largest;
    for (int k = 0; k < n; k++)
        if (!(x[k] - y[k] <= 1e-5f * largest && y[k] - x[k] <= 1e-5f * largest))
            return 1;
    return 0;
}

static void *room(size_t size)
{
    void *data = calloc(size ? size : 1, 1);
    if (!data)
        fail("there is no memory for", "the vectors");
    return data;
}

/* Run all steps and return the number of spikes; counts: of every neuron, one layer behind the other. */
static long simulate(uint16_t *counts, size_t neurons)
{
    long spikes = 0;
    memset(counts, 0, neurons * sizeof *counts);
    for (int t = 0; t < SNN_STEPS; t++) {
        uint16_t *there = counts;
        snn_step(t);
        for (struct part *layer = layers; layer->name; layer++)
            for (int k = 0; k < layer->size; k++) {
                const uint8_t spike = ((uint8_t *)layer->data)[k];
                *there = (uint16_t)(*there + spike);
                there++;
                spikes += spike;
            }
    }
    return spikes;
}

/* Replay one image of the vectors; returns its number of spikes. */
static long replay(FILE *file, uint16_t *counts, uint16_t *expected, float *reals, size_t neurons)
{
    for (struct part *image = images; image->name; image++)
        take(file, image->data, sizeof(float), image->size);
    START();
    simulate(counts, neurons);
    START();
    for (struct part *first = firsts; first->name; first++) {
        take(file, reals, sizeof *reals, first->size);
        if (differ(reals, first->data, first->size))
            fail("the image causes other currents in", first->name);
        memcpy(first->data, reals, (size_t)first->size * sizeof *reals); /* from here on, every bit is the same */
    }
    take(file, expected, sizeof *expected, (int)neurons);
    for (size_t k = 0; k < neurons; k++)
        first_differs += counts[k] != expected[k];
    const long spikes = simulate(counts, neurons);
    size_t k = 0;
    for (struct part *layer = layers; layer->name; k += (size_t)layer->size, layer++)
        if (memcmp(counts + k, expected + k, (size_t)layer->size * sizeof *counts))
            fail("other spike counts in", layer->name);
    READ();
    for (struct part *result = results; result->name; result++) {
        take(file, reals, sizeof *reals, result->size);
        if (differ(reals, result->data, result->size))
            fail("another output,", result->name);
    }
    return spikes;
}

int main(int count, char **words)
{
    FILE *file = count == 2 ? fopen(words[1], "rb") : NULL;
    char magic[4];
    int32_t sizes[2];
    if (!file) {
        fprintf(stderr, "error: use %s vectors.bin, a file that was written with this program\\n", words[0]);
        return 2;
    }
    take(file, magic, 1, 4);
    take(file, sizes, sizeof *sizes, 2);
    if (memcmp(magic, "SNN1", 4) || sizes[1] != SNN_TIMESTEPS)
        fail("no vectors of this network:", words[1]);
    size_t neurons = 0, most = 1;
    int number = 0;
    for (struct part *layer = layers; layer->name; layer++, number++)
        neurons += (size_t)layer->size;
    for (struct part *part = firsts; part->name; part++)
        most = (size_t)part->size > most ? (size_t)part->size : most;
    for (struct part *part = results; part->name; part++)
        most = (size_t)part->size > most ? (size_t)part->size : most;
    uint16_t *counts = room(neurons * sizeof *counts), *expected = room(neurons * sizeof *expected);
    float *reals = room(most * sizeof *reals);
    long spikes = 0;
    for (int32_t i = 0; i < sizes[0]; i++)
        spikes += replay(file, counts, expected, reals, neurons);
    printf("identical: %ld spikes of %d layers (%d images, T=%d); %d counts differ with currents of this program\\n",
           spikes, number, (int)sizes[0], SNN_TIMESTEPS, first_differs);
    free(counts);
    free(expected);
    free(reals);
    fclose(file);
    return 0;
}
"""
