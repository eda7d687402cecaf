"""From a trained model to a bundle of mobile variants that are proven right."""
