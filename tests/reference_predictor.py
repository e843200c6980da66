"""The predictor of csrc/core/predictor as plain numpy, from the formulas of docs/prediction.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

TAU = 0.35


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


@dataclass
class Rule:
    top_k: int
    is_sigmoid: bool = False
    num_groups: int = 1
    top_groups: int = 1

    def margins(self, logits, correction=None):
        """Margins of one token, and the standard deviation of its selection scores."""
        scores = np.asarray(logits, np.float64)
        if self.is_sigmoid:
            scores = sigmoid(scores) + (0 if correction is None else correction)
        deviation = scores.std()
        groups = scores.reshape(self.num_groups, -1)
        ranked = np.sort(groups, axis=1)[:, ::-1]
        value = ranked[:, :2].sum(1) if self.is_sigmoid else ranked[:, 0]
        chosen = np.argsort(-value, kind="stable")[: self.top_groups]
        eligible = np.zeros(groups.shape, bool)
        eligible[chosen] = True
        eligible = eligible.reshape(-1)
        inside = np.sort(scores[eligible])[::-1]
        last = inside[self.top_k - 1]
        border = (last + inside[self.top_k]) / 2 if len(inside) > self.top_k else last - deviation
        margins = scores - border
        margins[~eligible] = np.minimum(margins[~eligible], 0) - 2 * TAU * deviation
        return margins, deviation


@dataclass
class Pair:
    """What is learned for one layer and distance."""

    weights: Any
    gain: float = 1 / TAU
    gain_power: float = 0.0
    tokens: int = 0
    slope: float = 1.0
    offset: float = 0.0
    hessian: Any = field(default_factory=lambda: np.zeros((2, 2)))

    def score(self, x, base):
        return self.weights @ x + self.gain * base

    def need(self, scores):
        return sigmoid(self.slope * np.clip(scores, -12, 12) + self.offset)

    def learn(self, x, base, targets, scores):
        schedule = max(0.4, (1 + self.tokens / 10000) ** -0.5)
        error = sigmoid(scores) - targets
        self.weights -= 2 * schedule / (x @ x + 1e-6) * np.outer(error, x)
        gradient = error @ base
        self.gain_power += max(1 / (self.tokens + 1), 0.001) * (gradient**2 - self.gain_power)
        self.gain -= 0.02 * schedule * gradient / np.sqrt(self.gain_power + 1e-12)
        self.tokens += 1

    def calibrate(self, scores, was_routed):
        x = np.clip(scores, -12, 12)
        p = self.need(scores)
        features = np.stack([x, np.ones_like(x)])
        gradient = features @ (p - was_routed)
        hessian = (features * (p * (1 - p))) @ features.T
        tokens = self.tokens + 1
        self.hessian += max(1 / tokens, 0.002) * (hessian - self.hessian)
        damped = self.hessian.copy()
        damped[[0, 1], [0, 1]] = 1.01 * damped[[0, 1], [0, 1]] + 1e-4
        step = max(1 / (tokens + 20), 0.002) * np.linalg.solve(damped, gradient)
        self.slope = float(np.clip(self.slope - step[0], 0.1, 10))
        self.offset = float(np.clip(self.offset - step[1], -12, 12))


class ReferencePredictor:
    """Takes whole passes: [rows, layers, hidden] of one sequence, and one token id a row.

    With embeddings [rows, hidden] it foresees from these as well, as if from a layer -1.
    """

    def __init__(self, weights, rule, max_distance, num_buckets, biases=None, corrections=None):
        self.router, self.rule, self.max_distance = weights, rule, max_distance
        self.num_layers, self.num_experts, self.hidden = weights.shape
        self.biases, self.corrections = biases, corrections
        used = 2 * self.hidden + self.num_experts + 1
        self.num_features = -(-used // 16) * 16
        self.pairs = {
            (layer, distance): Pair(np.zeros((self.num_experts, self.num_features)))
            for layer in range(-1, self.num_layers)
            for distance in range(1, max_distance + 1)
            if layer + distance < self.num_layers
        }
        self.means = np.zeros((self.num_layers, num_buckets, self.num_experts))
        self.counts = np.zeros((self.num_layers, num_buckets))
        self.deviation = np.zeros(self.num_layers)
        self.seen = np.zeros(self.num_layers)
        self.previous = np.zeros((self.num_layers, self.hidden))

    def margins(self, layer, h):
        logits = self.router[layer].astype(np.float64) @ h
        if self.biases is not None:
            logits = logits + self.biases[layer]
        correction = None if self.corrections is None else self.corrections[layer]
        return self.rule.margins(logits, correction)

    def features(self, h, previous, target, token):
        x = np.zeros(self.num_features)
        size = self.hidden
        x[:size] = h / np.linalg.norm(h)
        x[size : 2 * size] = 0.5 * previous
        if token is not None:
            mean = self.means[target, token % self.means.shape[1]]
            x[2 * size : 2 * size + self.num_experts] = 0.375 * mean
        x[2 * size + self.num_experts] = 0.1
        return x

    def run_pass(self, hidden, tokens, embeddings=None):
        """Return the need that was foreseen: {(layer, distance): [experts]}, over all rows."""
        foreseen, bases = {}, {}
        rows = range(len(hidden))
        states = {layer: hidden[:, layer] for layer in range(self.num_layers)}
        if embeddings is not None:
            states = {-1: embeddings} | states
        for layer, seen in states.items():
            for distance in range(1, self.max_distance + 1):
                if (layer, distance) in self.pairs:
                    bases[layer, distance] = [self._base(layer, distance, h) for h in seen]
                    needs = [
                        self._need(
                            layer, distance, seen[row], row, bases[layer, distance][row], tokens
                        )
                        for row in rows
                    ]
                    foreseen[layer, distance] = 1 - np.prod([1 - need for need in needs], axis=0)
            if layer < 0:
                continue
            for row in rows:
                self._learn(layer, row, states, bases, tokens)
            self.previous[layer] = seen[-1] / np.linalg.norm(seen[-1])
        return foreseen

    def _base(self, layer, distance, h):
        margins, own = self.margins(layer + distance, h)
        seen = self.deviation[layer + distance]
        return margins / (seen if seen > 0 else own)

    def _need(self, layer, distance, h, row, base, tokens):
        target = layer + distance
        previous = self.previous[target] if row == 0 else np.zeros(self.hidden)
        token = None if tokens is None else tokens[row]
        x = self.features(h, previous, target, token)
        pair = self.pairs[layer, distance]
        return pair.need(pair.score(x, base))

    def _learn(self, layer, row, states, bases, tokens):
        margins, own = self.margins(layer, states[layer][row])
        self.seen[layer] += 1
        rate = max(0.01, 1 / self.seen[layer])
        self.deviation[layer] += rate * (own - self.deviation[layer])
        targets = sigmoid(margins / (TAU * self.deviation[layer]))
        before = states[layer][row - 1]
        previous = self.previous[layer] if row == 0 else before / np.linalg.norm(before)
        token = None if tokens is None else tokens[row]
        for distance in range(1, self.max_distance + 1):
            if layer - distance not in states:
                continue
            pair = self.pairs[layer - distance, distance]
            base = bases[layer - distance, distance][row]
            x = self.features(states[layer - distance][row], previous, layer, token)
            scores = pair.score(x, base)
            pair.calibrate(scores, margins > 0)
            pair.learn(x, base, targets, scores)
        if token is not None:
            bucket = token % self.means.shape[1]
            self.counts[layer, bucket] += 1
            rate = max(0.05, 1 / (self.counts[layer, bucket] + 1))
            usual = self.rule.top_k / self.num_experts
            self.means[layer, bucket] += rate * (targets - usual - self.means[layer, bucket])
