"""Mean and deviation of ImageNet's pixels in [0, 1], for red, green and blue.

Of torchvision's weights, and of everything else whose own are not known. Imports nothing heavy.
"""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
