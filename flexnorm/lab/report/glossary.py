"""What every number of the report means and how it was measured, in plain words."""

from __future__ import annotations

from flexnorm.lab.charts.markup import Markup, element

_ENTRIES = (
    (
        "Test accuracy",
        "The share of test images that the network classifies correctly after the last epoch, with the normalizers "
        "in evaluation mode. No run is stopped early, and no epoch is chosen by its test result.",
    ),
    (
        "Mean ± sd",
        "The mean over the seeds of a row and their sample standard deviation (n − 1). A seed fixes the initial "
        "weights and the order of the images. With one seed there is no spread, and none is shown.",
    ),
    (
        "Difference, paired by seed",
        "Test accuracy minus that of the baseline with the same optimizer and the same seed, in percentage points. "
        "Pairing takes away what the seed does to both. The bracket is the 95 % confidence interval of the mean "
        "difference by Student’s t; where it leaves zero out, the difference is in bold. Among many rows, some will be "
        "bold by chance alone.",
    ),
    (
        "Training loss",
        "The mean cross-entropy over the training images of an epoch, in nats, taken while the network was learning "
        "from them.",
    ),
    (
        "Internal covariate shift, W₁",
        "How far the distribution of a layer’s output moves when the weights are updated: the Wasserstein distance of "
        "order 1 (the average way that mass has to travel) between the outputs before and after an update, for one "
        "fixed batch of probe images in training mode, at up to 128 sampled positions. It is measured where the next "
        "linear map reads it, after normalization and activation, so that networks with and without normalization are "
        "compared at like places; and beside the training, which it does not change. The table has the mean over all "
        "measurements of a layer, then over the layers.",
    ),
    (
        "Certified interval [lower, upper]",
        "Bounds that hold without solving the transport problem: from below by what projections and moments of the two "
        "samples differ in, from above by pairing each image with itself. Every single measurement is checked against "
        "its own interval; where one lies outside, the table says “violated”. Bands around curves of the shift are "
        "this interval, averaged over seeds.",
    ),
    (
        "Relative shift",
        "W₁ divided by the spread of the layer’s output before the update (the mean distance of its points to their "
        "mean). A network can make W₁ small by making all its numbers small; the relative shift does not reward that. "
        "A value of 0.01 means that one update moves the output by a hundredth of its own spread.",
    ),
    (
        "Step time",
        "The median time of one update: forward, backward, optimizer; measuring the shift is not part of it. The ratio "
        "divides by the baseline’s step in the same sweep, with the same optimizer and seed; the table has the median "
        "over seeds. Whatever else the machine was doing shows up here: look at the single seeds before "
        "believing a small difference.",
    ),
    (
        "Diverged, refused, unfinished, missing",
        "Diverged: the loss was no longer a finite number, and the run ended there. Refused: this combination cannot "
        "train, for the reason given. Unfinished: interrupted; the same command resumes it. Missing: asked for, not "
        "yet begun. None of these enters a mean.",
    ),
    (
        "Bands, whiskers, small dots",
        "In learning curves a band reaches from the lowest to the highest seed. A whisker is one standard deviation to "
        "either side. Small dots are single seeds. A thin line that ends in a cross is a run that ended early.",
    ),
    (
        "Axes that are not linear",
        "Losses and shifts that span more than about a factor of ten have a logarithmic axis, with zeros drawn at its "
        "lower edge. Accuracies that reach 90 % have an axis that is logarithmic in the error: a step along it cuts "
        "the mistakes by the same factor everywhere.",
    ),
)


def glossary() -> Markup:
    """Return the glossary as a description list."""
    return element("dl", [element("div", element("dt", t), element("dd", d)) for t, d in _ENTRIES], class_="glossary")
