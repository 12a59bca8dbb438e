"""Datasets (digits, CIFAR-10/100, image folders), their statistics, splits, batches, augmentation and input checks."""
