"""Scores of images that can be compared: of exactly N images, with stated features, and with their protocol."""

from .collection import FeatureCollector, collect_features
from .distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distance_of_subsets,
    precision_recall,
)
from .extractors import DINOv2Extractor, FeatureExtractor, InceptionExtractor, load_extractor, weights_digest
from .image_sets import DatasetImages, FolderImages, ImageReader, NpzImages, open_image_set
from .protocol import EvaluationProtocol
from .statistics import Moments, feature_moments, load_moments, save_moments


__all__ = [
    "DINOv2Extractor",
    "DatasetImages",
    "EvaluationProtocol",
    "FeatureCollector",
    "FeatureExtractor",
    "FolderImages",
    "ImageReader",
    "InceptionExtractor",
    "Moments",
    "NpzImages",
    "collect_features",
    "feature_moments",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "kernel_distance_of_subsets",
    "load_extractor",
    "load_moments",
    "open_image_set",
    "precision_recall",
    "save_moments",
    "weights_digest",
]
