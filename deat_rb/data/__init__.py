"""Datasets: the embedded digits, CIFAR-10/100 and image folders; splits, batches, augmentation and input checks."""
