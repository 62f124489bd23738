import time, torch, cProfile, pstats, os, sys, gc
import gemma4_compile
from gemma4_compile.loading import random_model
from gemma4_compile.optimize import state_of
torch.set_grad_enabled(False)
t0=time.perf_counter()
def lap(what):
    global t0
    torch.cuda.synchronize(); t=time.perf_counter(); print(f"{what}: {t-t0:.2f} s", flush=True); t0=t
name=sys.argv[1]
m=random_model(name,None,"cuda"); lap("model")
gemma4_compile.optimize(m); lap("optimize")
p=state_of(m).packed_program(m); lap("program"); print({k:round(v,2) for k,v in p.plan.seconds.items()}, {k:round(v,2) for k,v in p.plan.record.seconds.items()}, p.plan.pieces, p.plan.unique_pieces)
ids=torch.randint(3,100000,(1,128)).cuda()
def g(n,i=ids,**o): m.generate(i,max_new_tokens=n,min_new_tokens=n,do_sample=False,**o)
g(1); lap("first prompt")
g(1); lap("second prompt")
g(2); lap("first decode")
g(64); lap("64")
g(64); lap("64")
def prof(f, label, n=12, sort="tottime"):
    pr=cProfile.Profile(); pr.enable(); f(); torch.cuda.synchronize(); pr.disable()
    print("==",label); pstats.Stats(pr).sort_stats(sort).print_stats(n)
prof(lambda: [g(1) for _ in range(5)], "5 prompts", 28)
prof(lambda: [g(1) for _ in range(5)], "5 prompts cum", 45, "cumtime")
prof(lambda: g(64), "64 tokens", 30)
c=state_of(m)._route._calls
print(state_of(m).cache_memory, [ {k:p.pages for k,p in s.pools.items()} for s in c.memory.slabs], c.graphs.refused, c.graphs.replays)
