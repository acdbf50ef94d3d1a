// The scheduler, and the C functions that Python calls.
//
// Divergence: the lanes of a warp form groups, one per place in the program; the group at the lowest place runs. Compilers lay code
// out so that the place where paths meet lies after both, so lanes that wait there are joined by the others. Where an instruction
// needs lanes that are elsewhere (.aligned, or a member mask), its group parks until they come: a program that is right is never
// called wrong because of the order in which its lanes ran. If every group parks, the lanes can never meet: that is the error.
#include <algorithm>
#include <atomic>
#include <thread>

#include "access.h"
#include "state.h"

namespace ptx {

void Warp::fail(const Inst& inst, int lane, const std::string& what) {
  throw Error(format("line %u: `%s`: %s [block (%u, %u, %u), warp %u, lane %d]", inst.line, std::string(inst.text).substr(0, 160).c_str(), what.c_str(),
                     cta->at[0], cta->at[1], cta->at[2], index, lane));
}

namespace {

u32 special_value(const Cta& cta, const Warp& w, u32 lane, const std::string& name) {
  const Launch& launch = *cta.launch;
  u32 thread = w.index * LANES + lane;
  auto axis = [&](const std::string& prefix) -> int {
    return name.rfind(prefix, 0) == 0 && name.size() == prefix.size() + 1 ? name.back() - 'x' : -1;
  };
  int k;
  if ((k = axis("%tid.")) >= 0) {
    u32 t[3] = {thread % launch.block[0], thread / launch.block[0] % launch.block[1], thread / launch.block[0] / launch.block[1]};
    return t[k];
  }
  if ((k = axis("%ntid.")) >= 0) return launch.block[k];
  if ((k = axis("%ctaid.")) >= 0) return cta.at[k];
  if ((k = axis("%nctaid.")) >= 0) return launch.grid[k];
  if ((k = axis("%cluster_ctaid.")) >= 0) return cta.at[k] % launch.cluster[k];
  if ((k = axis("%cluster_nctaid.")) >= 0) return launch.cluster[k];
  if ((k = axis("%clusterid.")) >= 0) return cta.at[k] / launch.cluster[k];
  if ((k = axis("%nclusterid.")) >= 0) return launch.grid[k] / launch.cluster[k];
  if (name == "%cluster_ctarank") {
    const u32* c = launch.cluster;
    return cta.at[0] % c[0] + c[0] * (cta.at[1] % c[1] + c[1] * (cta.at[2] % c[2]));
  }
  if (name == "%cluster_nctarank") return launch.cluster[0] * launch.cluster[1] * launch.cluster[2];
  if (name == "%laneid") return lane;
  if (name == "%warpid") return w.index;
  if (name == "%nwarpid") return cta.warps.size();
  if (name == "%lanemask_eq") return 1u << lane;
  if (name == "%lanemask_lt") return (1u << lane) - 1;
  if (name == "%lanemask_le") return (2u << lane) - 1;
  if (name == "%lanemask_gt") return ~((2u << lane) - 1);
  if (name == "%lanemask_ge") return ~((1u << lane) - 1);
  if (name == "%dynamic_smem_size") return launch.shared_bytes - launch.program->shared_static;
  if (name == "%total_smem_size") return launch.shared_bytes;
  throw Error("special register " + name + " is not implemented");
}

void start(Cta& cta) {
  const Program& p = *cta.launch->program;
  std::fill(cta.shared.begin(), cta.shared.end(), 0xff);  // NaN in every format
  std::fill(cta.local.begin(), cta.local.end(), 0xff);
  u32 threads = cta.launch->block[0] * cta.launch->block[1] * cta.launch->block[2];
  for (Barrier& b : cta.barriers) b = Barrier{};
  cta.mbarriers.clear();
  cta.bulks.clear();
  cta.free_registers = 0;
  // ptxas gives a kernel with setmaxnreg all registers that .maxnreg, or else the launch bounds, leave to each thread.
  const u32 bounded = p.most_threads ? 65536 / (p.most_threads * p.least_blocks) / 8 * 8 : 0;
  const u32 registers = p.most_registers ? p.most_registers : std::min(bounded, 255u);
  for (Warp& w : cta.warps) {
    std::fill(w.file.begin(), w.file.end(), 0xff);
    for (auto& [at, bytes] : p.fill) std::copy(bytes.begin(), bytes.end(), w.file.begin() + at);
    for (auto& [name, op] : p.specials)
      for (int l = 0; l < LANES; ++l) w.write(op, l, special_value(cta, w, l, name));
    u32 lanes = std::min(threads - w.index * LANES, u32(LANES));
    w.lanes = lanes == LANES ? FULL : (1u << lanes) - 1;
    w.alive = w.lanes;
    w.groups.assign(1, Group{0, w.alive});
    w.barrier = -1;
    w.copies.clear();
    w.failed_wait = w.yielded = w.again = false;
    w.cluster_phase = 0;
    std::fill(w.committed, w.committed + LANES, 0);
    std::fill(w.bulk_committed, w.bulk_committed + LANES, 0);
    w.registers = registers;
    w.wgmmas.clear();
    w.wgmma_committed = 0;
    w.wgmma_fenced = false;
    w.wgmma_state.assign(p.wgmma_register.size(), 0);
  }
}

Mask members(Warp& w, const Inst& i, Mask m) {
  int first = __builtin_ctz(m);
  const u32* masks = w.reg<u32>(i.op[i.member_op]);
  Mask wanted = masks[first];
  for (int l = 0; l < LANES; ++l) {
    if (!(m >> l & 1)) continue;
    if (masks[l] != wanted) w.fail(i, l, format("lanes disagree about the member mask: 0x%08x and 0x%08x", masks[l], wanted));
    if (!(wanted >> l & 1)) w.fail(i, l, format("this lane is not in the member mask 0x%08x", wanted));
  }
  return wanted & w.alive;
}

void insert(Warp& w, Group g) {
  auto it = std::lower_bound(w.groups.begin(), w.groups.end(), g, [](const Group& a, const Group& b) { return a.pc < b.pc; });
  if (it != w.groups.end() && it->pc == g.pc) {
    it->mask |= g.mask;
    it->parked = it->asleep = false;
  } else {
    w.groups.insert(it, g);
  }
}

// Registers of a wgmma, touched by another instruction.
void touch_wgmma(Warp& w, const Inst& i) {
  for (u32 k = 0; k < i.ops; ++k) {
    u32 at = i.op[k].at / 128;
    if (at >= w.wgmma_state.size() || !w.cta->launch->program->wgmma_register[at] || i.op[k].bytes != 4) continue;
    if (w.wgmma_state[at] & 1) w.fail(i, 0, "a register of a wgmma that is under way: no wgmma.wait_group covers it yet");
    w.wgmma_state[at] |= 2;
  }
}

// Runs a warp until it blocks, yields, ends or has run `quantum` instructions.
void run(Warp& w, u64 quantum) {
  Cta& cta = *w.cta;
  Launch& launch = *cta.launch;
  Counts& counts = cta.block->counts;
  const Inst* code = launch.program->code.data();
  for (Group& g : w.groups) g.asleep = false;
  w.yielded = false;
  while (quantum-- && w.alive) {
    size_t n = 0;
    while (n < w.groups.size() && (w.groups[n].parked || w.groups[n].asleep)) ++n;
    if (n == w.groups.size()) {
      bool asleep = std::any_of(w.groups.begin(), w.groups.end(), [](const Group& g) { return g.asleep; });
      if (asleep) {
        w.yielded = true;
        return;
      }
      const Group& g = w.groups[0];
      std::string others;
      for (size_t k = 1; k < w.groups.size(); ++k) others += format(", lanes 0x%08x at line %u", w.groups[k].mask, code[w.groups[k].pc].line);
      if (w.alive != w.lanes) others += format(", lanes 0x%08x have exited", w.lanes & ~w.alive);
      w.fail(code[g.pc], __builtin_ctz(g.mask), format("divergent: only lanes 0x%08x are here", g.mask) + others);
    }
    Group& g = w.groups[n];
    const Inst& i = code[g.pc];
    Mask m = g.mask;
    if (i.guard.at != ~0u) m &= w.predicate(i.guard);
    if (i.sync != Sync::none && m) {
      Mask need = i.sync == Sync::aligned ? w.lanes : members(w, i, m);
      if (m != need) {
        if ((g.mask & need) == need)
          w.fail(i, __builtin_ctz(need & ~m), format("divergent: lanes 0x%08x are needed, and the predicate keeps 0x%08x away", need, need & ~m));
        g.parked = true;
        continue;
      }
    }
    counts.instructions++;
    counts.kinds[i.kind]++;
    counts.thread_instructions += __builtin_popcount(m);
    cta.cluster->steps++;
    if (i.flow == Flow::next) {
      if (i.wgmma_registers && m) touch_wgmma(w, i);
      if (m) i.run(w, i, m);
      if (w.failed_wait) {  // a try_wait that found its phase open: let others run first
        w.failed_wait = false;
        g.asleep = true;
      }
      if (w.again) {
        w.again = false;
        g.asleep = true;
        continue;
      }
      u32 pc = ++g.pc;
      if (w.groups.size() > 1 && n + 1 < w.groups.size() && w.groups[n + 1].pc <= pc) {
        Group moved = g;
        w.groups.erase(w.groups.begin() + n);
        insert(w, moved);
      }
      if (w.barrier >= 0) return;
    } else {
      Group taken{i.target, m}, stays{g.pc + 1, g.mask & ~m};
      w.groups.erase(w.groups.begin() + n);
      if (stays.mask) insert(w, stays);
      if (i.flow == Flow::branch) {
        if (taken.mask) insert(w, taken);
      } else {
        w.alive &= ~m;
        // Lanes that wait for those that left must look again.
        for (Group& other : w.groups) other.parked = false;
      }
    }
    if (cta.cluster->steps > launch.limit) w.fail(i, 0, format("%llu warp instructions in one block and no end", (unsigned long long)launch.limit));
  }
  if (!w.alive) cta.cluster->progress++;
}

void stuck(Cluster& cluster) {
  std::string where;
  const Inst* first = nullptr;
  Warp* someone = nullptr;
  for (auto& cta : cluster.ctas) {
    const Inst* code = cta->launch->program->code.data();
    if (cluster.ctas.size() > 1) where += format("; block (%u, %u, %u)", cta->at[0], cta->at[1], cta->at[2]);
    for (Warp& w : cta->warps) {
      if (!w.alive) {
        where += format("; warp %u has exited", w.index);
        continue;
      }
      const Inst& at = code[w.barrier >= 0 ? w.groups[0].pc - 1 : w.groups[0].pc];
      if (!first) first = &at, someone = &w;
      where += format("; warp %u %s line %u", w.index, w.barrier >= 0 ? format("waits at barrier %d,", w.barrier).c_str() : "is at", at.line);
    }
  }
  someone->fail(*first, __builtin_ctz(someone->alive), "deadlock: no warp can go on" + where);
}

// Copies to shared memory complete as late as the program allows: when it can do nothing else. Here, the first of them.
bool complete_one(Cluster& cluster) {
  for (auto& cta : cluster.ctas)
    for (size_t k = 0; k < cta->bulks.size(); ++k)
      if (cta->bulks[k].to_shared) {
        complete_bulk(*cta, k);
        return true;
      }
  return false;
}

void run_cluster(Cluster& cluster) {
  cluster.arrived = cluster.phase = 0;
  cluster.open = cluster.done = View{};
  cluster.agents = cluster.warps;
  cluster.steps = 0;
  std::vector<Warp*> order;
  for (auto& cta : cluster.ctas) {
    start(*cta);
    start_races(*cta);
    for (Warp& w : cta->warps) order.push_back(&w);
  }
  const bool random = cluster.ctas[0]->launch->mode == Mode::random;
  int idle = 0;
  while (true) {
    u64 before = cluster.progress, steps = cluster.steps;
    bool alive = false, yielded = false;
    if (random) std::shuffle(order.begin(), order.end(), cluster.random);
    for (Warp* w : order) {
      if (!w->alive || w->barrier >= 0) {
        alive |= w->alive != 0;
        continue;
      }
      if (random)
        for (Copy& c : w->copies)
          if (cluster.random() % 4 == 0) deliver(*w, c, c.pending & Mask(cluster.random()));
      run(*w, random ? 1 + cluster.random() % 64 : 100000);
      alive |= w->alive != 0;
      yielded |= w->yielded;
    }
    if (!alive) break;
    if (random)
      for (auto& cta : cluster.ctas)
        if (!cta->bulks.empty() && cluster.random() % 2) {
          size_t which = cluster.random() % cta->bulks.size();
          if (cta->bulks[which].to_shared) complete_bulk(*cta, which);
        }
    bool moved = cluster.progress != before || (cluster.steps != steps && !yielded);
    if (!moved && complete_one(cluster)) continue;
    idle = moved ? 0 : idle + 1;
    if (idle > 200 || (!moved && cluster.steps == steps)) stuck(cluster);
  }
  for (auto& cta : cluster.ctas)
    for (const Bulk& b : cta->bulks)
      cta->warps[b.warp].fail(*b.inst, b.lane, b.to_shared ? "nobody has waited for this copy when the block ends" : "no cp.async.bulk.wait_group covers this copy, and the block ends");
}

}  // namespace

void add(Counts& to, const Counts& from) {
  u64* a = reinterpret_cast<u64*>(&to);
  const u64* b = reinterpret_cast<const u64*>(&from);
  for (size_t k = 0; k < sizeof(Counts) / sizeof(u64); ++k) a[k] += b[k];
}

void launch_grid(Launch& launch, u32 threads, Counts& total) {
  const Program& p = *launch.program;
  u32 size[3];  // of the grid, in clusters
  for (int d = 0; d < 3; ++d) {
    if (launch.cluster[d] == 0 || launch.grid[d] % launch.cluster[d]) throw Error(format("a grid of %u blocks in dimension %d is no multiple of the cluster's %u", launch.grid[d], d, launch.cluster[d]));
    size[d] = launch.grid[d] / launch.cluster[d];
  }
  const u32 together = launch.cluster[0] * launch.cluster[1] * launch.cluster[2];
  u64 clusters = u64(size[0]) * size[1] * size[2];
  u32 block = launch.block[0] * launch.block[1] * launch.block[2];
  std::atomic<u64> next{0};
  std::atomic<bool> stop{false};
  std::mutex report;
  std::string error;
  u64 error_at = ~u64(0);
  threads = u32(std::min<u64>(threads, clusters));
  std::vector<Block> blocks(std::max(threads, 1u));
  auto work = [&](Block& b) {
    for (const Region& r : launch.regions) {
      u64 sectors = r.bytes / 32 + 2;
      b.in_l1.emplace_back(launch.count ? sectors : 0);
      b.loaded.emplace_back(launch.count ? sectors : 0);
      b.stored.emplace_back(launch.count ? sectors : 0);
    }
    Cluster cluster;
    for (u32 rank = 0; rank < together; ++rank) {
      cluster.ctas.push_back(std::make_unique<Cta>());
      Cta& cta = *cluster.ctas.back();
      cta.cluster = &cluster;
      cta.launch = &launch;
      cta.block = &b;
      cta.shared.resize(p.shared_base + launch.shared_bytes);
      cta.local.resize(u64(p.local_bytes) * ((block + LANES - 1) / LANES * LANES));
      cta.warps.resize((block + LANES - 1) / LANES);
      for (u32 k = 0; k < cta.warps.size(); ++k) {
        cta.warps[k].cta = &cta;
        cta.warps[k].index = k;
        cta.warps[k].agent = cluster.warps++;
        cta.warps[k].file.resize(p.register_bytes);
      }
    }
    while (!stop) {
      u64 n = next++;
      if (n >= clusters) break;
      u32 first[3] = {u32(n % size[0]), u32(n / size[0] % size[1]), u32(n / size[0] / size[1])};
      for (u32 rank = 0; rank < together; ++rank) {
        Cta& cta = *cluster.ctas[rank];
        u32 in[3] = {rank % launch.cluster[0], rank / launch.cluster[0] % launch.cluster[1], rank / launch.cluster[0] / launch.cluster[1]};
        for (int d = 0; d < 3; ++d) cta.at[d] = first[d] * launch.cluster[d] + in[d];
        cta.serial = u32(n * together + rank + 1);
      }
      cluster.random.seed(launch.seed * 1000003 + n);
      try {
        run_cluster(cluster);
      } catch (const std::exception& e) {
        std::lock_guard<std::mutex> lock(report);
        if (n < error_at) error = e.what(), error_at = n;
        stop = true;
      }
    }
  };
  std::vector<std::thread> pool;
  for (u32 k = 1; k < threads; ++k) pool.emplace_back(work, std::ref(blocks[k]));
  work(blocks[0]);
  for (auto& t : pool) t.join();
  if (error_at != ~u64(0)) throw Error(error);
  for (Block& b : blocks) add(total, b.counts);
  if (launch.count)
    for (size_t r = 0; r < launch.regions.size(); ++r)
      for (u64 s = 0; s < blocks[0].loaded[r].size(); ++s) {
        bool loaded = false, stored = false;
        for (Block& b : blocks) loaded |= b.loaded[r][s], stored |= b.stored[r][s];
        total.dram_load_sectors += loaded, total.dram_store_sectors += stored;
      }
}

}  // namespace ptx

// ---- the face for Python (ctypes) ----

using namespace ptx;

static int report(char* error, u32 size, const std::exception& e) {
  std::snprintf(error, size, "%s", e.what());
  return 1;
}

extern "C" {

int ptx_parse(const char* text, const char* entry, void** out, char* error, u32 error_size) {
  try {
    auto r = std::make_unique<Program>(parse(text, entry));
    *out = r.release();
    return 0;
  } catch (const std::exception& e) {
    return report(error, error_size, e);
  }
}
void ptx_free(void* program) { delete static_cast<Program*>(program); }
u32 ptx_param_count(void* program) { return static_cast<Program*>(program)->params.size(); }
void ptx_param(void* program, u32 k, u32* at, u32* bytes) {
  const Param& p = static_cast<Program*>(program)->params[k];
  *at = p.at, *bytes = p.bytes;
}
// target, static shared bytes, parameter bytes, instructions, registers' bytes, required threads x 3, required cluster x 3
void ptx_info(void* program, u32* out) {
  const Program& p = *static_cast<Program*>(program);
  u32 values[] = {p.target, p.shared_static, p.param_bytes, u32(p.code.size()), p.register_bytes};
  std::copy(std::begin(values), std::end(values), out);
  std::copy(p.required_threads, p.required_threads + 3, out + 5);
  std::copy(p.required_cluster, p.required_cluster + 3, out + 8);
}

struct RunArguments {
  u32 grid[3], block[3], cluster[3];
  u32 shared_dynamic, params_bytes, regions, mode, count, races, threads;
  u64 seed, limit;
  const u8* params;
  const u64* region_base;
  const u64* region_bytes;
  u8* const* region_host;
  const u8* const* region_legal;
};

int ptx_run(void* program, const RunArguments* a, u64* counts, char* error, u32 error_size) {
  try {
    const Program& p = *static_cast<Program*>(program);
    Launch launch;
    launch.program = &p;
    std::copy(a->grid, a->grid + 3, launch.grid);
    std::copy(a->block, a->block + 3, launch.block);
    std::copy(a->cluster, a->cluster + 3, launch.cluster);
    launch.shared_bytes = p.shared_static + a->shared_dynamic;
    launch.params.assign(a->params, a->params + a->params_bytes);
    for (u32 k = 0; k < a->regions; ++k) launch.regions.push_back({a->region_base[k], a->region_bytes[k], a->region_host[k], a->region_legal[k]});
    std::vector<u8> globals = p.globals;
    if (!globals.empty()) launch.regions.push_back({p.globals_address, globals.size(), globals.data(), nullptr});
    launch.mode = Mode(a->mode);
    launch.seed = a->seed;
    launch.count = a->count;
    launch.races = a->races;
    launch.limit = a->limit;
    Counts total;
    launch_grid(launch, a->threads, total);
    std::memcpy(counts, &total, sizeof total);
    return 0;
  } catch (const std::exception& e) {
    return report(error, error_size, e);
  }
}

}  // extern "C"
