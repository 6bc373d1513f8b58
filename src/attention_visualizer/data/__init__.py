"""Images: which there are, how they are split, ordered and augmented, and what is drawn on them.

Hands out the LightningDataModule for training and image sets for analysis. May use models and below.

    augmentation.py  random affine and elastic movements of whole batches
    class_names.py   names of classes that a model declares
    datamodule.py    batches for Lightning: order, augmentation, resuming
    datasets.py      MNIST or the embedded digits, loaded and split
    image_sets.py    the images that are analysed: a test set, or a folder of pictures
    images.py        what a model must know of its images; from picture files to pixels
    ink.py           how much is drawn, pixel by pixel and patch by patch
    input_format.py  what pictures a model takes: size, channels, normalization
    mnist.py         the files of MNIST: found, checked, downloaded once
    strokes.py       end points, junctions, bends and edges of strokes
"""
