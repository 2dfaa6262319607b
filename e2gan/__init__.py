"""E2GAN: efficient training of efficient GANs for image-to-image translation (Gong et al., ICML 2024)."""
