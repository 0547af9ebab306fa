"""Masked Global Alignment in plain loops, float64: the independent computation that tests compare with."""

import torch


def unit(vector):
    return vector / vector.norm().clamp_min(1e-12)


def loss(latents, present, temperature):
    stays, modalities, _ = latents.shape
    held = [[m for m in range(modalities) if present[i, m]] for i in range(stays)]
    h = {(i, m): unit(latents[i, m]) for i in range(stays) for m in held[i]}

    def target(j, m):
        others = [k for k in held[j] if k != m] or held[j]
        return unit(sum(h[j, k] for k in others) / len(others)) if others else None

    per_modality = []
    for m in range(modalities):
        anchors = [i for i in range(stays) if m in held[i] and len(held[i]) >= 2]
        terms = []
        for i in anchors:
            scores = {j: h[i, m] @ target(j, m) / temperature for j in range(stays) if held[j]}
            terms.append(-torch.log_softmax(torch.stack(list(scores.values())), 0)[list(scores).index(i)])
        if terms:
            per_modality.append(torch.stack(terms).mean())
    return torch.stack(per_modality).mean() if per_modality else latents.new_zeros(())
