"""The concept farm: orchestration of E2GAN training over a cluster, from photos to served adapters."""
