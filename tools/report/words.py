"""The words of the demo's report, for readers who have never heard of SOAR."""

INTRODUCTION = """
<p class="lead">Four versions of one small picture generator, measured side by side: the pretrained one, and
what three ways of training it further made of it.</p>
<p>The generator starts from pure noise and removes a little of it in each of some twenty steps, guided by a
caption. In ordinary training it is shown real pictures with noise mixed in by hand, so it only ever sees
states that lie exactly between a real picture and noise. When it draws, it works on states that it made
itself, which are slightly wrong, and nobody taught it what to do there: errors add up from step to step.
This is called <em>exposure bias</em>.</p>
<p>SOAR (<em>Self-Correction for Optimal Alignment and Refinement</em>, arXiv 2604.12617) trains on that. For
every training picture the current model takes one drawing step of its own; from where that step lands, SOAR
teaches the direction that leads back to the real picture. No reward model and no human preferences are
needed.</p>
<table><tr><th>version</th><th style="text-align:left">what it is</th></tr>
<tr><td>base</td><td style="text-align:left">the pretrained model, deliberately mediocre</td></tr>
<tr><td>SFT</td><td style="text-align:left">ordinary training, continued on clean pictures with right
captions</td></tr>
<tr><td>control</td><td style="text-align:left">as SOAR, with the same number of training points at the same
noise levels, but on ideal states: whatever SOAR gains over this row comes from training on its own
errors</td></tr>
<tr><td>SOAR</td><td style="text-align:left">trained on the states that its own steps lead
to</td></tr></table>
"""

BENCHMARK = """
<p>Each version draws a picture for {prompts} captions, such as &ldquo;a red 3 left of a green 7&rdquo;. A
verifier, which was trained on handwritten digits that the generator has never seen, reads every picture and
decides whether it shows what was asked. Numbers are shares of right pictures (<em>reading back</em>: how
much of a string of digits can be read), &plusmn; one standard error. <em>Overall</em> is the mean of the six
categories above it.</p>
"""

GUIDANCE = """
<p>With classifier-free guidance the model's answer is pushed away from its answer to an empty caption:
nearly everyone draws this way. Both are shown because training on self-made states can act differently on
the two.</p>
"""

DRIFT = """
<p>Exposure bias can be measured. Take a held-out picture, add noise up to the first level, let the model
take {steps} steps down to the second, and ask it for the direction to the real picture from where it
landed. Its mean squared error there is the <em>drift</em>. <em>Relative</em> is that error divided by the
error at an ideal state of the same noise level: 1 would mean no exposure bias at all. SOAR trains on
something close to this number, so read it together with the benchmark, which no version trains on.</p>
"""

DRIFT_BARS = """
Bars: one standard error of each version alone. All were measured on the same pictures, so that differences are
known better than the bars say.
"""

ENERGY = """
<p>The <em>energy distance</em> compares all drawn pictures with real, held-out ones, through the eyes of the
verifier: 0 means that they cannot be told apart as a crowd. It notices loss of variety, which the benchmark
does not.</p>
"""


NOISE = """
&ldquo;Within noise&rdquo; means that the difference is smaller than about two standard errors of it: another
set of captions could turn it around. Differences between training runs with other seeds come on top.
"""

SAMPLES = """
The same captions and the same starting noise for every version, before (base) and after training, with
guidance {guidance:g}. Not selected.
"""

TRAINING = """
<p>All versions train on the same pictures in the same order with the same noise. SFT and the control ran in
one process each, side by side ({single:.0f} s). SOAR ran on {processes} processes ({soar:.0f} s): each layer
split over {tensor} of them (tensor parallelism, TP) and the layers over {pipeline} stages (pipeline
parallelism, PP), as a model too large for one processor would be. How the work is spread changes the result
by rounding only. Up to this report the demo took {total:.0f} s. <em>Work per picture</em> counts passes
through the model, a backward pass as two.</p>
"""

LOSSES = """
Mean squared error of the predicted direction. The two panels are different tasks: noise levels differ, and so
do the targets, so a lower curve is not a better model.
"""

DOUBTS = """
<ul>
<li>This is one training run per version on a toy: a model of about two million parameters and pictures of 16
x 16 pixels. It shows that the machinery works from end to end. It cannot say how well SOAR does on a large
model.</li> <li>The verifier tells {accuracy:.1%} of unseen handwritten digits right, and real pictures score
{real:.2f} &plusmn; {real_error:.2f} overall: no version can be measured beyond that.</li>
<li>Standard errors count the chance in captions and starting noise, not the chance in training. With many
numbers in the tables, about one in twenty differences looks real without being so.</li>
<li>The versions made equally many optimizer steps, not equally much computation: SOAR costs more per step
(see the seconds above).</li>
</ul>
"""

EXPORT = """
<p>The trained model is a normal diffusers pipeline in <code>{folder}</code>. As part of this demo diffusers'
own StableDiffusion3Pipeline loaded it and drew {drawn} from it.</p>
"""
