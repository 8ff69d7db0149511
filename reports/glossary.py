"""The words of a report, each explained in a sentence or two."""

GLOSSARY = {
    "95 % interval": "The range in which the value would lie for 95 % of such sets of images, if many were drawn. For "
    "an accuracy it is Wilson's; for a difference on the same images, Bonett and Price's.",
    "activation": "The output of a ReLU of the ANN. A spiking neuron represents it by how often it spikes.",
    "activation quantization": "T timesteps can only represent lambda times 0/T, 1/T, ... T/T; values between are "
    "rounded.",
    "ANN, float ANN": "The trained network with the weights it came with, before anything was rounded.",
    "clipping": "A neuron spikes at most once in a timestep, so activations above lambda are cut to lambda.",
    "correction of potentials": "Starting potentials are shifted so that mean firing rates match the ANN.",
    "firing rate": "Spikes for each neuron and timestep, between 0 and 1.",
    "inherited from earlier layers": "Error that a layer has because the spikes it reads are already wrong.",
    "integers of the neurons": "Rounding of weights to a common unit where branches meet, and of biases; and what "
    "fitting or training weights on spikes changes, which makes up for errors of other kinds.",
    "lambda": "The activation that one spike at every timestep stands for.",
    "membrane potential": "The running sum of a neuron's input. It falls by Vthr (or to 0) when the neuron spikes.",
    "mid-p, p, significant": "p is the probability of a difference at least this large if the two networks were "
    "equally good. Below 0.05 the report calls it significant. McNemar's test counts the images that only one of two "
    "networks has right. With several comparisons p is raised for their number (Holm).",
    "quantized ANN": "The ANN with integer weights, before it is turned into spikes.",
    "saturated": "A neuron that spikes at every timestep. A larger input changes nothing any more.",
    "score error": "How far the class scores are from the float ANN's. 0 % means the same scores for every image; "
    "100 % means as far as if every image got the average scores of all images.",
    "SNN": "The spiking network: the result of the conversion.",
    "synaptic operation": "One spike that reaches one neuron through one connection: an addition. Their number is "
    "a first measure of energy on spiking hardware.",
    "T, timesteps": "How many steps each layer fires for one image.",
    "test, validation and calibration images": "Test images give the reported accuracies. Validation images choose "
    "between flags, so that the choice does not flatter the reported numbers. Calibration images set lambda and Vthr; "
    "their labels are not read.",
    "unevenness (uneven arrival of spikes)": "Spikes that come early or late: a neuron fires before the input arrives "
    "that would have kept it silent, or has no time left to fire.",
    "Vthr": "The threshold of a neuron's membrane potential, an integer from the second layer on.",
    "weight quantization": "Float weights become integers of a few bits.",
}
