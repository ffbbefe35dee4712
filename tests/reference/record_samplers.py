"""The samplers and schedules that ComfyUI offers, by k-diffusion and diffusers: what record_parity.py records.

k-diffusion's own samplers are run; of its package only `sampling.py` is loaded, which needs none of what the rest is
built on. `uni_pc` is diffusers'. `ddim` is written out from the paper.
"""

import functools
import importlib.util
import math
import sys
import types

import torch
from diffusers import UniPCMultistepScheduler

NAMES = ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "ddim", "uni_pc"]
SCHEDULES = ["normal", "karras"]
DENOISE = [1.0, 0.6]
# what ComfyUI's uni_pc takes for 0
LEAST_SIGMA = 1e-3


@functools.cache
def k_diffusion_sampling():
    """k_diffusion/sampling.py without the package around it."""
    (folder,) = importlib.util.find_spec("k_diffusion").submodule_search_locations
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__ = [folder]
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    package.utils = utils
    return importlib.import_module("k_diffusion.sampling")


class Samplers:
    """For one model: `guided(x, t)` is its prediction for latents in the variance-preserving form."""

    def __init__(self, guided, alphas_cumprod, prediction_type, noises):
        self.guided, self.prediction_type, self.noises = guided, prediction_type, noises
        alphas_cumprod = alphas_cumprod.double()
        self.log_sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().log()
        self.k_diffusion = k_diffusion_sampling()

    def clean(self, x, sigma, **_):
        """D(x, sigma), asked at the nearest timestep."""
        sigma = float(sigma.flatten()[0]) if torch.is_tensor(sigma) else sigma
        distance = (self.log_sigmas - math.log(sigma)).abs()
        # The lower one of two that are as near, whatever the rounding.
        t = int((distance <= distance.min() + 1e-5).nonzero()[0])
        alpha = 1 / math.sqrt(1 + sigma**2)
        output = self.guided(x * alpha, t)
        if self.prediction_type == "v_prediction":
            return x * alpha**2 - output * sigma * alpha
        return x - output * sigma

    def sigma(self, timestep):
        low, part = int(timestep), timestep - int(timestep)
        high = min(low + 1, len(self.log_sigmas) - 1)
        return float(((1 - part) * self.log_sigmas[low] + part * self.log_sigmas[high]).exp())

    def schedule(self, name, steps):
        """steps + 1 noise levels."""
        if name == "normal":
            timesteps = torch.linspace(len(self.log_sigmas) - 1, 0, steps, dtype=torch.float64)
            return torch.tensor([*(self.sigma(float(t)) for t in timesteps), 0.0])
        ends = float(self.log_sigmas[0].exp()), float(self.log_sigmas[-1].exp())
        return self.k_diffusion.get_sigmas_karras(steps, *ends)

    def sigmas(self, sampler, schedule, steps, denoise):
        """As ComfyUI's KSampler: the last steps of a longer run, and for uni_pc without the last level but one."""
        longer = int(steps / denoise)
        if sampler == "uni_pc":
            sigmas = self.schedule(schedule, longer + 1)
            sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
        else:
            sigmas = self.schedule(schedule, longer)
        return sigmas[-(steps + 1) :].float()

    def sample(self, sampler, start, sigmas):
        """From standard normal noise."""
        x = start * torch.sqrt(1 + sigmas[0] ** 2)
        noises = iter(self.noises)
        options = {"noise_sampler": lambda *_: next(noises)[None]}
        match sampler:
            case "ddim":
                return self.ddim(x, sigmas)
            case "uni_pc":
                return self.uni_pc(x, sigmas)
            case "euler_ancestral" | "dpmpp_2m_sde":
                pass
            case _:
                options = {}
        run = getattr(self.k_diffusion, f"sample_{sampler}")
        return run(self.clean, x, sigmas, disable=True, **options)

    def ddim(self, x, sigmas):
        """Song et al. 2020, Eq. 12 with eta = 0."""
        sigmas = sigmas.double()
        abar = 1 / (1 + sigmas**2)
        z = x * abar[0].sqrt()
        for here, there, sigma in zip(abar, abar[1:], sigmas):
            clean = self.clean((z / here.sqrt()).float(), sigma)
            eps = (z - here.sqrt() * clean) / (1 - here).sqrt()
            z = there.sqrt() * clean + (1 - there).sqrt() * eps
        return z.float()

    def uni_pc(self, x, sigmas):
        steps = len(sigmas) - 1
        scheduler = UniPCMultistepScheduler(
            solver_order=min(3, steps - 1), solver_type="bh1", prediction_type="sample", lower_order_final=True)
        scheduler.set_timesteps(steps)
        scheduler.sigmas = torch.cat([sigmas[:-1], torch.tensor([LEAST_SIGMA])])
        scheduler.timesteps = torch.arange(steps, 0, -1)
        z = x / torch.sqrt(1 + sigmas[0] ** 2)
        for t, sigma in zip(scheduler.timesteps, sigmas):
            clean = self.clean(z * torch.sqrt(1 + sigma**2), sigma)
            z = scheduler.step(clean, t, z).prev_sample
        return z * math.sqrt(1 + LEAST_SIGMA**2)
